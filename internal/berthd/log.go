package berthd

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
)

// newLog returns the logger: lines on stderr, in tail, and in what else the settings name. Secrets
// stay out because their type prints nothing.
func newLog(o outputSettings, stderr, tail io.Writer) (log *slog.Logger, closeLog func(), err error) {
	var files []*logFile
	closeLog = func() {
		for _, f := range files {
			f.Close()
		}
	}
	all := &slog.HandlerOptions{Level: slog.LevelDebug} // what passes is decided once, above them
	handlers := []slog.Handler{slog.NewTextHandler(tail, all)}
	told := false // what stderr gets
	for _, sink := range []struct{ flag, target, format string }{
		{"log-human", o.logHuman, "text"},
		{"log-json", o.logJSON, "json"},
		{"log-stackdriver", o.logStackdriver, "stackdriver"},
	} {
		w := stderr
		switch sink.target {
		case "":
			continue
		case "/dev/stderr":
			told = true
		case "/dev/stdout":
			w = os.Stdout
		default:
			f, err := openLogFile(sink.target, maxLogFile)
			if err != nil {
				closeLog()
				return nil, nil, usagef("cannot use --%s: %w", sink.flag, err)
			}
			files = append(files, f)
			w = f
		}
		handlers = append(handlers, logHandler(sink.format, w))
	}
	if !told {
		handlers = append(handlers, logHandler(o.logFormat, stderr))
	}
	return slog.New(leveled{slog.NewMultiHandler(handlers...), o.logLevel}), closeLog, nil
}

func logHandler(format string, w io.Writer) slog.Handler {
	opts := &slog.HandlerOptions{Level: slog.LevelDebug}
	switch format {
	case "json":
		return slog.NewJSONHandler(w, opts)
	case "stackdriver":
		opts.ReplaceAttr = stackdriver
		return slog.NewJSONHandler(w, opts)
	}
	return slog.NewTextHandler(w, opts)
}

// stackdriver gives the fields of a line the names that Google Cloud's logging agents look for.
func stackdriver(groups []string, a slog.Attr) slog.Attr {
	if len(groups) > 0 {
		return a
	}
	switch a.Key {
	case slog.TimeKey:
		a.Key = "timestamp"
	case slog.MessageKey:
		a.Key = "message"
	case slog.LevelKey:
		level := strings.ToUpper(fmt.Sprint(a.Value.Any()))
		if strings.HasPrefix(level, "WARN") {
			level = "WARNING"
		}
		return slog.String("severity", level)
	}
	return a
}

// leveled lets through what has a level or more.
type leveled struct {
	slog.Handler
	level slog.Level
}

// Enabled implements slog.Handler.
func (l leveled) Enabled(_ context.Context, level slog.Level) bool { return level >= l.level }

// WithAttrs implements slog.Handler.
func (l leveled) WithAttrs(attrs []slog.Attr) slog.Handler {
	return leveled{l.Handler.WithAttrs(attrs), l.level}
}

// WithGroup implements slog.Handler.
func (l leveled) WithGroup(name string) slog.Handler {
	return leveled{l.Handler.WithGroup(name), l.level}
}
