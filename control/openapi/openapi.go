// Package openapi makes an OpenAPI 3.1 document of a table of routes. [New] makes the document; the
// schemas of bodies come from the Go types that are encoded and decoded, so they cannot differ from
// what is on the wire.
package openapi

import (
	"encoding"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Operation describes what one route does.
type Operation struct {
	// Summary is one line. Required.
	Summary string
	// Query lists the parameters that it reads from the query.
	Query []Param
	// Body is a value of the type that its JSON body decodes into; nil means it reads none.
	Body any
	// Status is that of a success; 0 means 200, and 101 when Socket is set.
	Status int
	// Answer is a value of the type of a successful answer; nil means that it has no JSON. With Socket
	// or [EventStream] it is the type of one message.
	Answer any
	// Media is the type of the answer when that is not JSON, such as [Text].
	Media string
	// Socket is [TextMessages] or [BinaryMessages] when the request is upgraded to a WebSocket, and
	// [MaybeText] when it is if it asks for it.
	Socket string
	// Errors lists the statuses of failure that are its own, beside those of authentication.
	Errors []int
}

// What answers consist of.
const (
	Text        = "text/plain; charset=utf-8"
	EventStream = "text/event-stream"

	TextMessages   = "text"
	BinaryMessages = "binary"
	MaybeText      = "text, when followed"
)

// Param is a parameter of the query. A required one says so.
type Param struct {
	Name     string
	Type     string // string, integer or boolean; a boolean counts when it is present
	Doc      string
	Required bool
}

// Route is a row of the table: an operation and where it is.
type Route struct {
	Method, Path string
	// Security names the scheme in [Info.Security] that a caller must satisfy; empty means none.
	Security string
	Operation
}

// Info is what a document says of the API as a whole.
type Info struct {
	Title, Version, Server string
	// Security describes each scheme by name.
	Security map[string]string
	// Header is where a token is sent.
	Header string
	// Failure is a value of the type of every failure's body.
	Failure any
}

var pathParam = regexp.MustCompile(`\{([a-z]+)(\.\.\.)?\}`)

// New returns the document as JSON. It fails when a row says too little, or what another one says.
func New(info Info, routes []Route) ([]byte, error) {
	d := &document{schemas: map[string]any{}, types: map[string]reflect.Type{}}
	paths := map[string]map[string]any{}
	for _, r := range routes {
		op, err := d.operation(info, r)
		if err != nil {
			return nil, fmt.Errorf("cannot describe %s %s: %w", r.Method, r.Path, err)
		}
		path := pathParam.ReplaceAllString(r.Path, "{$1}")
		if paths[path] == nil {
			paths[path] = map[string]any{}
		}
		method := strings.ToLower(r.Method)
		if paths[path][method] != nil {
			return nil, fmt.Errorf("cannot describe %s %s: it is there twice", r.Method, r.Path)
		}
		paths[path][method] = op
	}
	schemes := map[string]any{}
	for name, doc := range info.Security {
		schemes[name] = object{"type": "apiKey", "in": "header", "name": info.Header, "description": doc}
	}
	failure, err := d.schema(reflect.TypeOf(info.Failure))
	if err != nil {
		return nil, fmt.Errorf("cannot describe failures: %w", err)
	}
	return json.MarshalIndent(object{
		"openapi": "3.1.0",
		"info":    object{"title": info.Title, "version": info.Version},
		"servers": []any{object{"url": info.Server}},
		"paths":   paths,
		"components": object{
			"schemas":         d.schemas,
			"securitySchemes": schemes,
			"responses": object{"Failure": object{
				"description": "What went wrong", "content": object{"application/json": object{"schema": failure}},
			}},
		},
	}, "", " ")
}

type object = map[string]any

// document gathers the schemas of named types.
type document struct {
	schemas map[string]any
	types   map[string]reflect.Type
}

func (d *document) operation(info Info, r Route) (object, error) {
	if r.Summary == "" {
		return nil, fmt.Errorf("it has no summary")
	}
	op := object{"summary": r.Summary, "operationId": operationID(r)}
	var params []any
	for _, m := range pathParam.FindAllStringSubmatch(r.Path, -1) {
		params = append(params, object{"name": m[1], "in": "path", "required": true, "schema": object{"type": "string"}})
	}
	for _, p := range r.Query {
		params = append(params, object{
			"name": p.Name, "in": "query", "required": p.Required, "description": p.Doc, "allowEmptyValue": p.Type == "boolean",
			"schema": object{"type": p.Type},
		})
	}
	if params != nil {
		op["parameters"] = params
	}
	if r.Body != nil {
		schema, err := d.schema(reflect.TypeOf(r.Body))
		if err != nil {
			return nil, err
		}
		op["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": schema}}}
	}
	responses, err := d.responses(r)
	if err != nil {
		return nil, err
	}
	if r.Security != "" {
		if _, ok := info.Security[r.Security]; !ok {
			return nil, fmt.Errorf("nobody knows the security scheme %q", r.Security)
		}
		op["security"] = []any{object{r.Security: []any{}}}
		responses["401"] = failureRef
	}
	op["responses"] = responses
	return op, nil
}

var failureRef = object{"$ref": "#/components/responses/Failure"}

func (d *document) responses(r Route) (object, error) {
	all := object{}
	for _, status := range r.Errors {
		all[strconv.Itoa(status)] = failureRef
	}
	answer := object{}
	if r.Answer != nil {
		schema, err := d.schema(reflect.TypeOf(r.Answer))
		if err != nil {
			return nil, err
		}
		answer["application/json"] = object{"schema": schema}
		switch {
		case r.Media == EventStream:
			answer = object{EventStream: object{"schema": schema}}
		case r.Socket == TextMessages, r.Socket == BinaryMessages:
			all["101"] = object{"description": "A WebSocket of " + r.Socket + " messages", "content": answer}
		}
	}
	switch {
	case r.Socket == TextMessages, r.Socket == BinaryMessages:
		if r.Answer == nil {
			all["101"] = object{"description": "A WebSocket of " + r.Socket + " messages"}
		}
		return all, nil
	case r.Socket != "":
		all["101"] = object{"description": "A WebSocket of messages: " + r.Socket}
	}
	if r.Media != "" && r.Media != EventStream {
		answer[r.Media] = object{"schema": object{"type": "string"}}
	}
	status := r.Status
	if status == 0 {
		status = http.StatusOK
	}
	success := object{"description": http.StatusText(status)}
	if len(answer) > 0 {
		success["content"] = answer
	}
	all[strconv.Itoa(status)] = success
	return all, nil
}

// operationID makes a name of a method and a path, as generated clients want one.
func operationID(r Route) string {
	name := strings.ToLower(r.Method)
	for word := range strings.FieldsFuncSeq(r.Path, func(c rune) bool { return strings.ContainsRune("/-{}.@", c) }) {
		name += strings.ToUpper(word[:1]) + word[1:]
	}
	return name
}

var (
	textMarshaler = reflect.TypeFor[encoding.TextMarshaler]()
	known         = map[reflect.Type]object{
		reflect.TypeFor[time.Time]():       {"type": "string", "format": "date-time"},
		reflect.TypeFor[time.Duration]():   {"type": "integer", "format": "int64", "description": "nanoseconds"},
		reflect.TypeFor[uuid.UUID]():       {"type": "string", "format": "uuid"},
		reflect.TypeFor[uuid.NullUUID]():   {"type": []string{"string", "null"}, "format": "uuid"},
		reflect.TypeFor[json.RawMessage](): {},
		reflect.TypeFor[any]():             {},
	}
	kinds = map[reflect.Kind]object{
		reflect.Bool: {"type": "boolean"}, reflect.String: {"type": "string"},
		reflect.Int: {"type": "integer"}, reflect.Int32: {"type": "integer", "format": "int32"}, reflect.Int64: {"type": "integer", "format": "int64"},
		reflect.Uint16: {"type": "integer", "minimum": 0, "maximum": 65535}, reflect.Float64: {"type": "number"},
	}
)

func (d *document) schema(t reflect.Type) (object, error) {
	if s, ok := known[t]; ok {
		return maps.Clone(s), nil
	}
	switch {
	case t.Kind() == reflect.Pointer:
		return d.schema(t.Elem())
	case t.Implements(textMarshaler):
		return object{"type": "string"}, nil
	case t.Kind() == reflect.Slice:
		items, err := d.schema(t.Elem())
		return object{"type": []string{"array", "null"}, "items": items}, err
	case t.Kind() == reflect.Map:
		values, err := d.schema(t.Elem())
		return object{"type": []string{"object", "null"}, "additionalProperties": values}, err
	case t.Kind() == reflect.Struct:
		return d.structure(t)
	}
	if s, ok := kinds[t.Kind()]; ok {
		return maps.Clone(s), nil
	}
	return nil, fmt.Errorf("%s has no JSON schema here", t)
}

// structure names the type of a struct and describes it once.
func (d *document) structure(t reflect.Type) (object, error) {
	ref := object{"$ref": "#/components/schemas/" + t.Name()}
	switch other, ok := d.types[t.Name()]; {
	case t.Name() == "":
		return nil, fmt.Errorf("%s has no name", t)
	case ok && other != t:
		return nil, fmt.Errorf("%s and %s have one name", t, other)
	case ok:
		return ref, nil
	}
	d.types[t.Name()] = t
	properties, required := object{}, []string{}
	for _, f := range reflect.VisibleFields(t) {
		tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || f.Anonymous || tag == "-" {
			continue
		}
		name := tag
		if name == "" {
			name = f.Name
		}
		s, err := d.schema(f.Type)
		if err != nil {
			return nil, fmt.Errorf("%s.%s: %w", t.Name(), f.Name, err)
		}
		properties[name] = s
		if !slices.Contains(strings.Split(options, ","), "omitempty") {
			required = append(required, name)
		}
	}
	s := object{"type": "object", "properties": properties}
	if len(required) > 0 {
		s["required"] = required
	}
	d.schemas[t.Name()] = s
	return ref, nil
}
