package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire/tailnetpb"
)

// FuzzReadAnswer reads whatever might come in place of an answer of the server.
func FuzzReadAnswer(f *testing.F) {
	f.Add(200, "application/json", []byte(`{"external_url":"http://x","version":"v1","agent_api_version":"1.0"}`))
	f.Add(400, "application/json; charset=utf-8", []byte(`{"message":"m","detail":"d","validations":[{"field":"f","detail":"x"}]}`))
	f.Add(302, "text/html", []byte("<html>"))
	f.Add(500, "application/json", []byte(`{"message":""}`))
	f.Add(200, "application/json", []byte(`{"Regions":{"1":null,"2":{"Nodes":[null]}}}`))
	f.Add(200, ";", []byte("null"))
	f.Fuzz(func(t *testing.T, status int, media string, body []byte) {
		respond := func() *http.Response {
			return &http.Response{
				StatusCode: status, Header: http.Header{"Content-Type": {media}, "Location": {"/elsewhere"}},
				Body: io.NopCloser(bytes.NewReader(body)),
			}
		}
		for _, into := range []any{
			new(BuildInfo), new(Agent), new([]AgentSummary), new(ConnectionInfo), new(SessionToken), new(ListeningPorts), new(Containers), new([]LogEntry),
		} {
			if err := ReadJSON(respond(), http.StatusOK, into); err == nil {
				if status != http.StatusOK {
					t.Errorf("an answer of status %d was taken", status)
				}
				if m, ok := into.(*ConnectionInfo); ok && m.DERPMap != nil {
					DERPMapFromProto(m.DERPMap.Proto())
				}
			}
		}
		err := ReadError(respond())
		var plain *Error
		var odd *UnexpectedResponse
		switch {
		case errors.As(err, &plain):
			if plain.Message == "" || plain.StatusCode != status {
				t.Errorf("an error of status %d, %q", plain.StatusCode, plain.Message)
			}
		case !errors.As(err, &odd):
			t.Errorf("another error: %T", err)
		case len(odd.Body) > 512:
			t.Errorf("%d bytes of a body were kept", len(odd.Body))
		}
		_ = err.Error()
	})
}

// FuzzDERPMap takes a relay map from either of its forms to the other and back.
func FuzzDERPMap(f *testing.F) {
	f.Add([]byte(`{"HomeParams":{"RegionScore":{"1":2}},"Regions":{"1":{"RegionID":1,"Nodes":[{"Name":"1a","RegionID":1,"HostName":"h","STUNPort":-1}]}}}`), []byte{})
	f.Add([]byte(`{"Regions":{"1":null}}`), []byte("\x12\x02\x08\x01"))
	f.Add([]byte(`{"Regions":{"1":{"Nodes":[null]}}}`), []byte("\x0a\x00\x12\x06\x08\x01\x12\x02\x32\x00"))
	f.Fuzz(func(t *testing.T, text, message []byte) {
		m := new(DERPMap)
		if json.Unmarshal(text, m) == nil {
			once := m.Proto()
			if twice := DERPMapFromProto(once).Proto(); !proto.Equal(once, twice) && !hasNaN(once) {
				t.Errorf("%v came back as %v", once, twice)
			}
		}
		p := new(tailnetpb.DERPMap)
		if proto.Unmarshal(message, p) == nil {
			once := DERPMapFromProto(p)
			if once.Proto().HomeParams == nil {
				t.Error("no home parameters: a stock agent crashes on that")
			}
			if twice := DERPMapFromProto(once.Proto()); !hasNaN(p) && !reflect.DeepEqual(once, twice) {
				t.Errorf("%+v came back as %+v", once, twice)
			}
		}
	})
}

func hasNaN(m *tailnetpb.DERPMap) bool {
	for _, score := range m.GetHomeParams().GetRegionScore() {
		if score != score {
			return true
		}
	}
	return false
}

// FuzzVersion reads versions, and the text by which a server names its own.
func FuzzVersion(f *testing.F) {
	f.Add("2.10")
	f.Add("2")
	f.Add("-1.0")
	f.Add("99999999999999999999.1")
	f.Add("server is at version 2.6, behind requested minor version 2.10")
	f.Add("server is at version ., behind requested minor version ")
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := ParseVersion(s); err == nil {
			again, err := ParseVersion(v.String())
			if err != nil || again != v {
				t.Errorf("%q is %v, which is %v, %v", s, v, again, err)
			}
			if v.Accept() == nil && (v.Major != CurrentVersion.Major || v.Minor > CurrentVersion.Minor) {
				t.Errorf("%v was accepted", v)
			}
		}
		if v, ok := ServerVersion(s); ok && !strings.HasPrefix(s, "server is at version ") {
			t.Errorf("%q names version %v", s, v)
		}
	})
}

// FuzzPTYOutput cuts streams into pieces: all of one is shown but its ending, and that is found however it was cut.
func FuzzPTYOutput(f *testing.F) {
	f.Add([]byte("last words"), "closed", true, uint8(3))
	f.Add([]byte("a\x1b_berth-ending;{}\x1b\\b\x1b_berth"), "", true, uint8(1))
	f.Add([]byte("\x1b_berth-ending;"), "", false, uint8(5))
	f.Add(bytes.Repeat([]byte("\x1b_berth-ending;"), 100), "", true, uint8(255))
	f.Fuzz(func(t *testing.T, text []byte, reason string, ends bool, size uint8) {
		stream := bytes.Clone(text)
		if ends {
			stream = AppendPTYEnding(stream, PTYEnding{Code: 1, Reason: reason})
		}
		_, want, wantOK := CutPTYEnding(stream[max(0, len(stream)-MaxPTYEnding):])
		var o PTYOutput
		var shown []byte
		for rest := stream; len(rest) > 0; {
			n := min(len(rest), int(size)+1)
			shown = append(shown, o.Next(rest[:n])...)
			rest = rest[n:]
			if len(o.held) > MaxPTYEnding {
				t.Fatalf("%d bytes are held back", len(o.held))
			}
		}
		rest, got, ok := o.End()
		shown = append(shown, rest...)
		if got != want || ok != wantOK || ends && !ok {
			t.Errorf("found %+v, %v; want %+v, %v", got, ok, want, wantOK)
		}
		if ends && !bytes.Equal(shown, text) || !ends && !ok && !bytes.Equal(shown, stream) {
			t.Errorf("%q was shown of %q", shown, stream)
		}
	})
}
