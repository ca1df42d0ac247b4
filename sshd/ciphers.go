package sshd

import (
	"slices"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/cpu"
)

// ciphers are what clients may choose from.
var ciphers = offered(cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL)

// offered are the library's ciphers, without ChaCha20 where the processor has instructions for AES. The client chooses; OpenSSH's took ChaCha20
// first until its version 10, and the library's takes more than twice the time of its AES. Clients without AES do not exist: many servers have
// nothing else.
func offered(aes bool) []string {
	all := ssh.SupportedAlgorithms().Ciphers
	if aes {
		all = slices.DeleteFunc(all, func(name string) bool { return name == ssh.CipherChaCha20Poly1305 })
	}
	return all
}
