package conformance

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/hashicorp/yamux"
)

// Packet kinds of dRPC.
const (
	packetInvoke    = 1
	packetMessage   = 2
	packetError     = 3
	packetCancel    = 4
	packetClose     = 5
	packetCloseSend = 6
	packetMetadata  = 7
)

// packet is one dRPC packet, whole.
type packet struct {
	kind       byte
	control    bool
	stream, id uint64
	data       []byte
}

func (p packet) String() string {
	return fmt.Sprintf("kind %d stream %d message %d data %q", p.kind, p.stream, p.id, p.data)
}

// frame is a packet as one frame.
func frame(kind byte, stream, id uint64, data []byte) []byte {
	b := []byte{1 | kind<<1}
	b = binary.AppendUvarint(b, stream)
	b = binary.AppendUvarint(b, id)
	b = binary.AppendUvarint(b, uint64(len(data)))
	return append(b, data...)
}

// frames are a packet cut into frames of at most 64 KiB, as senders have to.
func frames(kind byte, stream, id uint64, data []byte) []byte {
	var b []byte
	for len(data) > 64<<10 {
		part := frame(kind, stream, id, data[:64<<10])
		part[0] &^= 1
		b, data = append(b, part...), data[64<<10:]
	}
	return append(b, frame(kind, stream, id, data)...)
}

// readPacket puts the frames of the next packet together and holds the sender to the rules.
func readPacket(r *bufio.Reader) (packet, error) {
	var p packet
	for first := true; ; first = false {
		control, err := r.ReadByte()
		if err != nil {
			return p, err
		}
		var n [3]uint64
		for i := range n {
			if n[i], err = binary.ReadUvarint(r); err != nil {
				return p, fmt.Errorf("cut frame: %w", err)
			}
		}
		kind := control >> 1 & 0x3f
		if !first && (kind != p.kind || n[0] != p.stream || n[1] != p.id) {
			return p, fmt.Errorf("a frame of kind %d stream %d message %d amid %v", kind, n[0], n[1], p)
		}
		if n[2] > 64<<10 {
			return p, fmt.Errorf("a frame of %d bytes", n[2])
		}
		p.kind, p.control, p.stream, p.id = kind, control&0x80 != 0, n[0], n[1]
		data := make([]byte, n[2])
		if _, err := io.ReadFull(r, data); err != nil {
			return p, fmt.Errorf("cut frame: %w", err)
		}
		if p.data = append(p.data, data...); len(p.data) > 4<<20 {
			return p, errors.New("a packet of more than 4 MiB")
		}
		if control&1 != 0 {
			return p, nil
		}
	}
}

// rpcError is what an Error packet says.
type rpcError struct {
	code uint64
	text string
}

func (e *rpcError) Error() string { return fmt.Sprintf("code %d: %s", e.code, e.text) }

// call is one RPC on a stream of its own.
type call struct {
	net.Conn
	r    *bufio.Reader
	id   uint64 // of the last packet written
	seen uint64 // of the last packet read
}

func newCall(c net.Conn) *call { return &call{Conn: c, r: bufio.NewReader(c)} }

func (c *call) send(kind byte, data []byte) error {
	c.id++
	_, err := c.Write(frames(kind, 1, c.id, data))
	return err
}

// next reads the next message; io.EOF is a clean end of the other side's messages.
func (c *call) next() ([]byte, error) {
	for {
		p, err := readPacket(c.r)
		if err != nil {
			return nil, err
		}
		if p.stream != 1 || p.id <= c.seen {
			return nil, fmt.Errorf("after message %d came %v", c.seen, p)
		}
		c.seen = p.id
		switch p.kind {
		case packetMessage:
			return p.data, nil
		case packetError:
			if len(p.data) < 8 {
				return nil, fmt.Errorf("an error of %d bytes", len(p.data))
			}
			return nil, &rpcError{binary.BigEndian.Uint64(p.data), string(p.data[8:])}
		case packetClose, packetCloseSend:
			return nil, io.EOF
		case packetCancel:
			return nil, errors.New("canceled by the other side")
		default:
			if !p.control {
				return nil, fmt.Errorf("a packet that has no business here: %v", p)
			}
		}
	}
}

// session is the yamux session over an RPC socket, from the caller's side.
type session struct {
	t  testing.TB
	ws *websocket.Conn
	mx *yamux.Session
}

func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.LogOutput = io.Discard
	return c
}

// dial opens a byte-stream socket and the session over it. A refusal is an error with its answer.
func dial(t testing.TB, url string, header http.Header) (*session, *http.Response, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ws, resp, err := websocket.Dial(ctx, url, &websocket.DialOptions{HTTPHeader: header})
	if err != nil {
		return nil, resp, err
	}
	ws.SetReadLimit(-1)
	mx, err := yamux.Client(websocket.NetConn(context.Background(), ws, websocket.MessageBinary), muxConfig())
	if err != nil {
		t.Fatal(err)
	}
	s := &session{t, ws, mx}
	t.Cleanup(s.close)
	return s, resp, nil
}

// close takes the socket away without a word; yamux on top of it ends by itself.
func (s *session) close() {
	s.ws.CloseNow()
	s.mx.Close()
}

// open starts an RPC with nothing but its Invoke.
func (s *session) open(method string) *call {
	s.t.Helper()
	stream, err := s.mx.OpenStream()
	if err != nil {
		s.t.Fatalf("%s: no stream: %v", method, err)
	}
	c := newCall(stream)
	c.SetDeadline(time.Now().Add(60 * time.Second))
	if err := c.send(packetInvoke, []byte(method)); err != nil {
		s.t.Fatalf("%s: %v", method, err)
	}
	return c
}

// raw makes a unary call with the bytes given, in one write as stock peers do.
func (s *session) raw(method string, request []byte) ([]byte, error) {
	s.t.Helper()
	stream, err := s.mx.OpenStream()
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	c := newCall(stream)
	c.SetDeadline(time.Now().Add(60 * time.Second))
	var b bytes.Buffer
	b.Write(frame(packetInvoke, 1, 1, []byte(method)))
	b.Write(frames(packetMessage, 1, 2, request))
	b.Write(frame(packetCloseSend, 1, 3, nil))
	if _, err := stream.Write(b.Bytes()); err != nil {
		return nil, err
	}
	reply, err := c.next()
	if err != nil {
		return nil, err
	}
	if _, err := c.next(); err != io.EOF {
		return nil, fmt.Errorf("after the reply came %v, not CloseSend", err)
	}
	return reply, nil
}

const (
	agentService   = "/coder.agent.v2.Agent/"
	tailnetService = "/coder.tailnet.v2.Tailnet/"
)

// rpc is a method of the services, with its messages.
type rpc struct{ method, request, response string }

// rpcs are the rows of rpc-agent.md §4 and rpc-tailnet.md §2.
var rpcs = map[string]rpc{}

func init() {
	for _, name := range strings.Fields(`GetManifest:GetManifestRequest:Manifest GetServiceBanner:GetServiceBannerRequest:ServiceBanner
		UpdateStats UpdateLifecycle:UpdateLifecycleRequest:Lifecycle BatchUpdateAppHealths:BatchUpdateAppHealthRequest:BatchUpdateAppHealthResponse
		UpdateStartup:UpdateStartupRequest:Startup BatchUpdateMetadata BatchCreateLogs GetAnnouncementBanners
		ScriptCompleted:WorkspaceAgentScriptCompletedRequest:WorkspaceAgentScriptCompletedResponse
		GetResourcesMonitoringConfiguration PushResourcesMonitoringUsage ReportConnection:ReportConnectionRequest:google.Empty
		CreateSubAgent DeleteSubAgent ListSubAgents ReportBoundaryLogs UpdateAppStatus PushContextState`) {
		part := append(strings.Split(name, ":"), "", "")
		r := rpc{agentService + part[0], "agent." + part[1], "agent." + part[2]}
		if part[1] == "" {
			r.request, r.response = "agent."+part[0]+"Request", "agent."+part[0]+"Response"
		} else if strings.HasPrefix(part[2], "google.") {
			r.response = part[2]
		}
		rpcs[part[0]] = r
	}
	rpcs["Coordinate"] = rpc{tailnetService + "Coordinate", "tailnet.CoordinateRequest", "tailnet.CoordinateResponse"}
	rpcs["StreamDERPMaps"] = rpc{tailnetService + "StreamDERPMaps", "tailnet.StreamDERPMapsRequest", "tailnet.DERPMap"}
	rpcs["PostTelemetry"] = rpc{tailnetService + "PostTelemetry", "tailnet.TelemetryRequest", "tailnet.TelemetryResponse"}
	rpcs["RefreshResumeToken"] = rpc{tailnetService + "RefreshResumeToken", "tailnet.RefreshResumeTokenRequest", "tailnet.RefreshResumeTokenResponse"}
	rpcs["WorkspaceUpdates"] = rpc{tailnetService + "WorkspaceUpdates", "tailnet.WorkspaceUpdatesRequest", "tailnet.WorkspaceUpdate"}
}

// call makes a unary call of the named method.
func (s *session) call(name string, request m) (m, error) {
	s.t.Helper()
	r, ok := rpcs[name]
	if !ok {
		s.t.Fatalf("no RPC is called %s", name)
	}
	reply, err := s.raw(r.method, encode(r.request, request))
	if err != nil {
		return nil, err
	}
	return decode(r.response, reply)
}

// must makes a call that has to succeed.
func (s *session) must(name string, request m) m {
	s.t.Helper()
	reply, err := s.call(name, request)
	if err != nil {
		s.t.Fatalf("%s: %v", name, err)
	}
	return reply
}

// stream is a streaming call by its tables.
type stream struct {
	*call
	rpc rpc
}

// stream opens a streaming call; a request of nil leaves it at the Invoke.
func (s *session) stream(name string, request m) *stream {
	s.t.Helper()
	r := rpcs[name]
	c := &stream{s.open(r.method), r}
	if request != nil {
		if err := errors.Join(c.send(packetMessage, encode(r.request, request)), c.call.send(packetCloseSend, nil)); err != nil {
			s.t.Fatalf("%s: %v", name, err)
		}
	}
	return c
}

func (c *stream) say(request m) error {
	return c.send(packetMessage, encode(c.rpc.request, request))
}

// hear reads the next message.
func (c *stream) hear() (m, error) {
	b, err := c.next()
	if err != nil {
		return nil, err
	}
	return decode(c.rpc.response, b)
}
