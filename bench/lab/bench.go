package lab

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"text/tabwriter"
)

// Bench is a command that measures in a [World], part by part.
type Bench struct {
	Name   string // of its folder below bench
	Bin    string // folder with our programs; empty to build them
	Only   string // the part that is measured; empty for all
	Rounds int    // how often each is measured
}

// Part is one thing that is measured. It prints rows of the table.
type Part struct {
	Name    string
	Measure func(out io.Writer) error
}

// Main is the main function of a bench with these parts: it reads the flags, those that others have defined before too, and runs run. With
// -quick it calls quickly before, for settings under which figures mean nothing.
func (b *Bench) Main(parts string, quickly func(), run func(ctx context.Context, out io.Writer) error) {
	quick := flag.Bool("quick", false, "little of everything, once, to see that it works")
	flag.StringVar(&b.Bin, "bin", "", "folder with berth, berthd and berthd-ptyhost; without it they are built as for a release")
	flag.StringVar(&b.Only, "only", "", "measure only "+parts)
	flag.IntVar(&b.Rounds, "rounds", b.Rounds, "how often each is measured")
	flag.Parse()
	if *quick {
		quickly()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "bench/%s: %v\n", b.Name, err)
		os.Exit(1)
	}
}

// In calls measure with a folder that is removed afterwards, when the programs are there.
func (b *Bench) In(ctx context.Context, measure func(dir string) error) error {
	dir, err := os.MkdirTemp("", "b"+b.Name) // short: sockets lie in it
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if b.Bin == "" {
		b.Bin = dir
		if err := Build(ctx, dir); err != nil {
			return err
		}
	}
	return measure(dir)
}

// Table measures the parts that are asked for, and prints what they say. An error comes with the log of the world, which it ends.
func (b *Bench) Table(out io.Writer, w *World, parts ...Part) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "what\tby\tmedian\tleast to most\tto its peer\t\n")
	for _, part := range parts {
		if b.Only != "" && b.Only != part.Name {
			continue
		}
		if err := part.Measure(table); err != nil {
			return fmt.Errorf("%s: %w\n%s", part.Name, err, w.Log())
		}
	}
	return table.Flush()
}
