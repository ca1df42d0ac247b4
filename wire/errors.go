package wire

import "strings"

// Error is the body of every failed HTTP answer. As a Go error it also carries the status.
type Error struct {
	// StatusCode is the HTTP status it came with; 0 when made locally.
	StatusCode int `json:"-"`
	// Message is one sentence for people, Detail what is behind it.
	Message     string       `json:"message"`
	Detail      string       `json:"detail,omitempty"`
	Validations []Validation `json:"validations,omitempty"`
}

// Validation names a field of the request and what is wrong with it.
type Validation struct {
	Field  string `json:"field"`
	Detail string `json:"detail"`
}

// Error implements error.
func (e *Error) Error() string {
	parts := []string{e.Message}
	if e.Detail != "" {
		parts = append(parts, e.Detail)
	}
	for _, v := range e.Validations {
		parts = append(parts, v.Field+": "+v.Detail)
	}
	return strings.Join(parts, ": ")
}

// Validation returns what the answer says about a field.
func (e *Error) Validation(field string) (detail string, ok bool) {
	for _, v := range e.Validations {
		if v.Field == field {
			return v.Detail, true
		}
	}
	return "", false
}
