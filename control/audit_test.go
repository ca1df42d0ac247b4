package control

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/berthd/berth/wire"
)

// TestAuditIsShort: what a stranger sends is quoted in the log, but not all of it.
func TestAuditIsShort(t *testing.T) {
	x := serve(t, Config{})
	region, name := strings.Repeat("r", 15<<10), strings.Repeat("n", 30<<10)
	for path, body := range map[string]any{
		"aws":   wire.AWSInstanceIdentity{Signature: "eHg=", Document: `{"region":"` + region + `"}`, AgentName: name},
		"azure": wire.AzureInstanceIdentity{Signature: "eHg=", Encoding: region, AgentName: name},
	} {
		text, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		if status, body := x.call("POST", "/api/v2/workspaceagents/"+path+"-instance-identity", string(text)); status != http.StatusUnauthorized {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	x.stop()
	found := 0
	for line := range strings.Lines(x.log.String()) {
		if !strings.Contains(line, "audit: ") {
			continue
		}
		found++
		if !strings.Contains(line, "asked_for=nnnn") || !strings.Contains(line, "rrrr") || len(line) > maxText+1024 {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
	}
	if found != 2 {
		t.Errorf("%d lines", found)
	}
}
