package wire

import "log/slog"

// redacted is what a [Secret] prints as.
const redacted = "[redacted]"

// Secret is a credential. Every way to print, log or marshal it yields "[redacted]";
// only [Secret.Reveal] gives the value.
type Secret string

// Reveal returns the value, for the place that sends it.
func (s Secret) Reveal() string { return string(s) }

// String implements [fmt.Stringer].
func (s Secret) String() string { return redacted }

// GoString implements [fmt.GoStringer], for %#v.
func (s Secret) GoString() string { return redacted }

// LogValue implements [slog.LogValuer].
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements [encoding.TextMarshaler], which encoding/json uses too.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
