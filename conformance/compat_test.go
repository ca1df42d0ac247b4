package conformance

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestCompat holds docs/compat.md to what there is: every row of the table, every method of the protocol
// files, every route that the server describes and every message has a line there, and every test that is
// named there exists.
func TestCompat(t *testing.T) {
	b, err := os.ReadFile("../docs/compat.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	lines := map[string]bool{} // by the first cell
	for _, line := range strings.Split(doc, "\n") {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
				lines[name[1]] = true
			}
			if strings.Contains(cells[1], "`") && len(testName.FindAllString(line, -1)) == 0 {
				t.Errorf("the line names no test: %s", line)
			}
		}
	}
	for _, row := range rows {
		if !lines[row] {
			t.Errorf("%q has no line", row)
		}
	}
	for file, service := range map[string]string{"../wire/agentpb/agent.proto": "Agent", "../wire/tailnetpb/tailnet.proto": "Tailnet"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		methods := regexp.MustCompile(`(?m)^\s*rpc\s+(\w+)`).FindAllStringSubmatch(string(b), -1)
		if len(methods) < 5 {
			t.Fatalf("%s has %d methods", file, len(methods))
		}
		for _, method := range methods {
			if !lines[service+"."+method[1]] {
				t.Errorf("%s.%s has no line", service, method[1])
			}
		}
	}
	for name := range messages {
		_, short, _ := strings.Cut(name, ".")
		if strings.HasPrefix(name, "google.") || strings.Contains(short, ".") || strings.HasSuffix(short, "Request") || strings.HasSuffix(short, "Response") {
			continue // parts of others
		}
		if !strings.Contains(doc, "`"+short+"`") {
			t.Errorf("the message %s is in no field group", short)
		}
	}
	existing := map[string]bool{}
	err = filepath.WalkDir("..", func(p string, d os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(p, "_test.go") {
			b, readErr := os.ReadFile(p)
			for _, name := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(string(b), -1) {
				existing[name[1]] = true
			}
			return readErr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range testName.FindAllString(doc, -1) {
		if !existing[name] {
			t.Errorf("the test %s, which compat.md names, does not exist", name)
		}
	}
	w := stage(t)
	var described struct {
		Paths map[string]map[string]any `json:"paths"`
	}
	r := request(t, "GET", w.url+"/api/v2/openapi.json", "", nil).wants(t, 200, "")
	if err := json.Unmarshal(r.body, &described); err != nil {
		t.Fatal(err)
	}
	for path := range described.Paths {
		if !strings.HasPrefix(path, "/api/v2/berth/") && !strings.Contains(doc, path+"`") {
			t.Errorf("the server describes %s, which has no line", path)
		}
	}
}

var testName = regexp.MustCompile(`\bTest[A-Z]\w*`)
