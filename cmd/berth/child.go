package main

import (
	"context"
	"os"

	"github.com/berthd/berth/internal/berthd"
)

// childVerb makes this binary act as berthd, so that `berth up` needs no second one. It is no verb for people.
const childVerb = "berthd"

func runChild(args []string, out, errOut *os.File) int {
	return berthd.Main(context.Background(), args, os.Environ(), os.Stdin, out, errOut)
}
