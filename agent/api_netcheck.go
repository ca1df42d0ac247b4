package agent

import (
	"net"
	"net/http"
)

// healthReport is the head of each part of a netcheck.
type healthReport struct {
	Error     string   `json:"error,omitempty"`
	Severity  string   `json:"severity"`
	Warnings  []string `json:"warnings"`
	Dismissed bool     `json:"dismissed"`
}

// netcheckReport answers GET netcheck. NetInfo is Tailscale's own record, which stock clients only
// print; berth has none and sends null.
type netcheckReport struct {
	healthReport
	NetInfo    *struct{}        `json:"net_info"`
	Interfaces interfacesReport `json:"interfaces"`
}

type interfacesReport struct {
	healthReport
	Interfaces []networkInterface `json:"interfaces"`
}

type networkInterface struct {
	Name      string   `json:"name"`
	MTU       int      `json:"mtu"`
	Addresses []string `json:"addresses"`
}

// safeMTU is what a WireGuard packet of the mesh needs: 1280 bytes of payload, and 98 of headers.
const safeMTU = 1378

func (a *api) netcheck(w http.ResponseWriter, _ *http.Request) {
	interfaces, err := reportInterfaces()
	if err != nil {
		writeError(w, http.StatusInternalServerError, "Failed to run interfaces report", err)
		return
	}
	writeJSON(w, http.StatusOK, netcheckReport{healthReport: healthReport{Severity: "ok"}, Interfaces: interfaces})
}

func reportInterfaces() (interfacesReport, error) {
	report := interfacesReport{healthReport: healthReport{Severity: "ok"}, Interfaces: []networkInterface{}}
	list, err := net.Interfaces()
	if err != nil {
		return report, err
	}
	for _, i := range list {
		shown := networkInterface{Name: i.Name, MTU: i.MTU, Addresses: []string{}}
		addrs, err := i.Addrs()
		if err != nil {
			return report, err
		}
		for _, addr := range addrs {
			shown.Addresses = append(shown.Addresses, addr.String())
		}
		if i.Flags&net.FlagUp != 0 && i.Flags&net.FlagLoopback == 0 && i.MTU > 0 && i.MTU < safeMTU {
			report.Severity = "warning"
			report.Warnings = append(report.Warnings, "Network interface "+i.Name+" has an MTU below 1378, which may hang direct connections.")
		}
		report.Interfaces = append(report.Interfaces, shown)
	}
	return report, nil
}
