package wire_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var reference = regexp.MustCompile(`docs/([a-z]+\.md)(?:#([a-z0-9-]+))?`)

// Each exported constant and variable says which page explains it, itself or in the comment of its group,
// and the page has that heading.
func TestConstantsAreExplained(t *testing.T) {
	headings := map[string]map[string]bool{}
	anchors := func(page string) map[string]bool {
		if known := headings[page]; known != nil {
			return known
		}
		text, err := os.ReadFile(filepath.Join("..", "docs", page))
		if err != nil {
			t.Error(err)
		}
		found := map[string]bool{}
		for line := range strings.Lines(string(text)) {
			if title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
				anchor := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(strings.TrimSpace(title)), "")
				found[strings.ReplaceAll(anchor, " ", "-")] = true
			}
		}
		headings[page] = found
		return found
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	checked := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			group, ok := d.(*ast.GenDecl)
			if !ok || group.Tok != token.CONST && group.Tok != token.VAR {
				continue
			}
			for _, s := range group.Specs {
				value := s.(*ast.ValueSpec)
				if !value.Names[0].IsExported() {
					continue
				}
				checked++
				found := reference.FindStringSubmatch(group.Doc.Text() + value.Doc.Text())
				if found == nil {
					t.Errorf("%s: %s does not say which page of docs explains it", fset.Position(value.Pos()), value.Names[0])
				} else if found[2] != "" && !anchors(found[1])[found[2]] {
					t.Errorf("%s: %s names docs/%s#%s, which is not there", fset.Position(value.Pos()), value.Names[0], found[1], found[2])
				}
			}
		}
	}
	if checked < 40 {
		t.Errorf("only %d constants were looked at", checked)
	}
}
