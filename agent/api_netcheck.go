package agent

import (
	"fmt"
	"net"
	"net/http"
)

// healthReport is the head of each part of a netcheck. Warnings are always null: what a stock client
// expects in it is not known, and it must not fail to read the rest.
type healthReport struct {
	Error     string   `json:"error,omitempty"`
	Severity  string   `json:"severity"`
	Warnings  []string `json:"warnings"`
	Dismissed bool     `json:"dismissed"`
	// Notes are warnings in plain words, berth's addition.
	Notes []string `json:"notes,omitempty"`
}

// netcheckReport answers GET netcheck.
type netcheckReport struct {
	healthReport
	NetInfo    *netInfo         `json:"net_info"`
	Interfaces interfacesReport `json:"interfaces"`
}

// netInfo is what is known of Tailscale's record of that name, with its keys; what is not known is
// left out, as there.
type netInfo struct {
	PreferredDERP int                `json:",omitzero"`
	DERPLatency   map[string]float64 `json:",omitempty"` // seconds, by region and address family
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
	report := netcheckReport{healthReport: healthReport{Severity: "ok"}, Interfaces: interfaces}
	if self := a.self(); self != nil {
		report.NetInfo = &netInfo{PreferredDERP: int(self.GetPreferredDerp()), DERPLatency: self.GetDerpLatency()}
	}
	writeJSON(w, http.StatusOK, report)
}

// InterfaceNotes says which network interfaces are too narrow for direct paths.
func InterfaceNotes() []string {
	report, err := reportInterfaces()
	if err != nil {
		return nil
	}
	return report.Notes
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
			report.Notes = append(report.Notes, fmt.Sprintf("Network interface %s has an MTU below %d, which may hang direct connections.", i.Name, safeMTU))
		}
		report.Interfaces = append(report.Interfaces, shown)
	}
	return report, nil
}
