package berthd

import (
	"slices"
	"strings"
)

// environment is a process environment by name.
type environment map[string]string

func newEnvironment(pairs []string) environment {
	env := make(environment, len(pairs))
	for _, pair := range pairs {
		if name, value, ok := strings.Cut(pair, "="); ok {
			env[name] = value
		}
	}
	return env
}

// first returns the first of names that is set and not empty.
func (e environment) first(names ...string) (name, value string) {
	for _, name := range names {
		if value := e[name]; value != "" {
			return name, value
		}
	}
	return "", ""
}

// list returns the environment in the form of os.Environ.
func (e environment) list() []string {
	pairs := make([]string, 0, len(e))
	for name, value := range e {
		pairs = append(pairs, name+"="+value)
	}
	slices.Sort(pairs)
	return pairs
}
