package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/mattn/go-runewidth"
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
	// faint are the rows that matter less; a terminal shows them dimmed.
	faint map[int]bool
}

func (t *table) add(cells ...string) {
	for i, c := range cells {
		cells[i] = clean(c)
		if cells[i] == "" {
			cells[i] = noCell
		}
	}
	t.rows = append(t.rows, cells)
}

// addFaint is add for a row that matters less.
func (t *table) addFaint(cells ...string) {
	if t.faint == nil {
		t.faint = map[int]bool{}
	}
	t.faint[len(t.rows)] = true
	t.add(cells...)
}

const (
	noCell = "-"
	// minLast and minColumn are what columns are not cut below: less would not be worth its place.
	minLast, minColumn = 16, 8
)

// print aligns the columns. With a width over zero, which is a terminal's, columns without anything in
// them are left out, and the last one and then the widest are cut to fit.
func (t *table) print(w io.Writer, width int) error {
	all := append([][]string{t.head}, t.rows...)
	var columns, widths []int
	for i := range t.head {
		full, empty := 0, len(t.rows) > 0
		for n, row := range all {
			full = max(full, runewidth.StringWidth(row[i]))
			empty = empty && (n == 0 || row[i] == noCell)
		}
		if width > 0 && empty {
			continue
		}
		columns, widths = append(columns, i), append(widths, full)
	}
	if width > 0 {
		fit(widths, width)
	}
	var b strings.Builder
	for n, row := range all {
		var line strings.Builder
		for i, column := range columns {
			cell := runewidth.Truncate(row[column], widths[i], "…")
			if line.WriteString(cell); i < len(columns)-1 {
				line.WriteString(strings.Repeat(" ", widths[i]-runewidth.StringWidth(cell)+len(columnGap)))
			}
		}
		if width > 0 && t.faint[n-1] && coloured() {
			fmt.Fprintf(&b, "\x1b[2m%s\x1b[0m\n", line.String())
			continue
		}
		b.WriteString(line.String() + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

const columnGap = "  "

// fit cuts columns until they and the gaps between them fit a width, or none can be cut further.
func fit(widths []int, width int) {
	over := (len(widths) - 1) * len(columnGap)
	for _, w := range widths {
		over += w
	}
	over -= width
	last := len(widths) - 1
	if over > 0 && widths[last] > minLast {
		by := min(over, widths[last]-minLast)
		widths[last] -= by
		over -= by
	}
	for ; over > 0; over-- {
		widest := 0
		for i, w := range widths {
			if w > widths[widest] {
				widest = i
			}
		}
		if widths[widest] <= minColumn {
			return
		}
		widths[widest]--
	}
}

// coloured tells whether terminals may be sent colours (no-color.org).
func coloured() bool { return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" }

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
