package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// format is a value of --output.
type format string

const (
	formatText format = "text"
	formatJSON format = "json"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "text|json" }
func (f *format) Set(s string) error {
	if s != string(formatText) && s != string(formatJSON) {
		return fmt.Errorf("it must be text or json")
	}
	*f = format(s)
	return nil
}

// outputFlag adds --output to a command.
func outputFlag(cmd *cobra.Command) *format {
	f := formatText
	cmd.Flags().VarP(&f, "output", "o", "how to print")
	cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return &f
}

// printJSON prints v indented.
func printJSON(w io.Writer, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = w.Write(append(cleanJSON(data), '\n'))
	return err
}

// printJSONLine prints v on one line, for output without an end.
func printJSONLine(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(cleanJSON(data), '\n'))
	return err
}

// table is text in columns. Its cells are cleaned, so they may hold anything.
type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) {
	for i, c := range cells {
		cells[i] = clean(c)
		if cells[i] == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// print aligns the columns. With a width over zero, the last one is cut to fit it.
func (t *table) print(w io.Writer, width int) error {
	widths := make([]int, len(t.head))
	all := append([][]string{t.head}, t.rows...)
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, row := range all {
		used := 0
		for i, cell := range row {
			if i == len(row)-1 {
				b.WriteString(cut(cell, width-used))
				break
			}
			b.WriteString(cell)
			b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
			used += widths[i] + 2
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cut shortens s to width characters. What is too narrow to be worth it is left as it is.
func cut(s string, width int) string {
	const narrow = 10
	if width < narrow || utf8.RuneCountInString(s) <= width {
		return s
	}
	return string([]rune(s)[:width-1]) + "…"
}

// width returns the columns of standard output, 0 if it is no terminal.
func (p *program) width() int {
	w, _, err := term.GetSize(int(p.out.Fd()))
	if err != nil {
		return 0
	}
	return w
}

// printTable prints a table to standard output, or says what is empty on standard error.
func (p *program) printTable(t *table, empty string) error {
	if len(t.rows) == 0 {
		fmt.Fprintln(p.errOut, empty)
		return nil
	}
	return t.print(p.out, p.width())
}

// progress is one line on standard error that says what is being waited for. It shows on a terminal only.
type progress struct {
	w     *os.File
	shows bool
	drawn bool
}

func (p *program) progress() *progress {
	return &progress{w: p.errOut, shows: term.IsTerminal(int(p.errOut.Fd()))}
}

func (p *progress) say(format string, args ...any) {
	if p.shows {
		fmt.Fprintf(p.w, "\r\x1b[K%s", clean(fmt.Sprintf(format, args...)))
		p.drawn = true
	}
}

// done wipes the line.
func (p *progress) done() {
	if p.drawn {
		io.WriteString(p.w, "\r\x1b[K")
		p.drawn = false
	}
}

// ago says how long ago something was, to the precision a person wants.
func ago(now, then time.Time) string {
	d := now.Sub(then)
	switch {
	case d < 0, d < time.Second:
		return "now"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	}
	return fmt.Sprintf("%dd ago", int(d.Hours()/24))
}

// duration prints a latency with three digits at most.
func duration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%dµs", d.Microseconds())
	case d < 100*time.Millisecond:
		return fmt.Sprintf("%.1fms", float64(d)/float64(time.Millisecond))
	case d < 10*time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	}
	return d.Round(time.Second).String()
}
