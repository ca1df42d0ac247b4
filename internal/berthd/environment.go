package berthd

import "strings"

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
