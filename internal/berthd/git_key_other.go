//go:build !linux

package berthd

// holdKey makes a key readable for a program of this user by a path, until release is called.
func holdKey(pem []byte) (path string, release func(), err error) { return tempKey("", pem) }
