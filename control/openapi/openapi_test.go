package openapi

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
)

type leaf struct {
	At    time.Time  `json:"at"`
	Until *time.Time `json:"until,omitempty"`
}

type tree struct {
	ID       uuid.UUID       `json:"id"`
	Parent   uuid.NullUUID   `json:"parent"`
	Leaves   []leaf          `json:"leaves"`
	ByName   map[string]leaf `json:"by_name,omitempty"`
	Timeout  time.Duration   `json:"timeout"`
	Branches []*tree         `json:"branches,omitempty"`
	hidden   int
	Status   int `json:"-"`
	Cased    bool
}

func TestSchemas(t *testing.T) {
	text, err := New(Info{Failure: leaf{}}, []Route{{Method: "GET", Path: "/trees/{id}", Operation: Operation{Summary: "A tree", Answer: tree{hidden: 1}}}})
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Paths      map[string]map[string]struct{ Parameters []object }
		Components struct{ Schemas map[string]any }
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	date := object{"type": "string", "format": "date-time"}
	want := map[string]any{
		"leaf": object{"type": "object", "properties": object{"at": date, "until": date}, "required": []any{"at"}},
		"tree": object{
			"type": "object",
			"properties": object{
				"id":       object{"type": "string", "format": "uuid"},
				"parent":   object{"type": []any{"string", "null"}, "format": "uuid"},
				"leaves":   object{"type": []any{"array", "null"}, "items": object{"$ref": "#/components/schemas/leaf"}},
				"by_name":  object{"type": []any{"object", "null"}, "additionalProperties": object{"$ref": "#/components/schemas/leaf"}},
				"timeout":  object{"type": "integer", "format": "int64", "description": "nanoseconds"},
				"branches": object{"type": []any{"array", "null"}, "items": object{"$ref": "#/components/schemas/tree"}},
				"Cased":    object{"type": "boolean"},
			},
			"required": []any{"id", "parent", "leaves", "timeout", "Cased"},
		},
	}
	if diff := cmp.Diff(want, got.Components.Schemas); diff != "" {
		t.Error(diff)
	}
	if p := got.Paths["/trees/{id}"]["get"].Parameters; len(p) != 1 || p[0]["name"] != "id" || p[0]["required"] != true {
		t.Errorf("parameters %v", p)
	}
}

func TestMistakes(t *testing.T) {
	said := Operation{Summary: "x"}
	type nothing struct{ C chan int }
	for name, c := range map[string]struct {
		routes []Route
		want   string
	}{
		"silent":  {[]Route{{Method: "GET", Path: "/x"}}, "no summary"},
		"twice":   {[]Route{{Method: "GET", Path: "/x", Operation: said}, {Method: "GET", Path: "/x", Operation: said}}, "there twice"},
		"unknown": {[]Route{{Method: "GET", Path: "/x", Security: "magic", Operation: said}}, "magic"},
		"channel": {[]Route{{Method: "GET", Path: "/x", Operation: Operation{Summary: "x", Answer: nothing{}}}}, "no JSON schema"},
	} {
		if _, err := New(Info{Failure: leaf{}}, c.routes); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
