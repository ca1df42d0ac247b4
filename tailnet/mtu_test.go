package tailnet

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var mtuSrc, mtuDst = netip.MustParseAddr("fd7a:115c:a1e0::1"), netip.MustParseAddr("fd7a:115c:a1e0::2")

// synPacket is a SYN with options.
func synPacket(options ...byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, header.TCPOptionNOP)
	}
	size := header.TCPMinimumSize + len(options)
	pkt := make([]byte, header.IPv6MinimumSize+size)
	src, dst := tcpip.AddrFrom16(mtuSrc.As16()), tcpip.AddrFrom16(mtuDst.As16())
	header.IPv6(pkt).Encode(&header.IPv6Fields{PayloadLength: uint16(size), TransportProtocol: header.TCPProtocolNumber, HopLimit: 64, SrcAddr: src, DstAddr: dst})
	tcp := header.TCP(pkt[header.IPv6MinimumSize:])
	tcp.Encode(&header.TCPFields{SrcPort: 1, DstPort: 2, Flags: header.TCPFlagSyn, DataOffset: uint8(size), WindowSize: 1000})
	copy(tcp[header.TCPMinimumSize:], options)
	tcp.SetChecksum(^tcp.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(size))))
	return pkt
}

func validTCP(pkt []byte) bool {
	tcp := header.TCP(pkt[header.IPv6MinimumSize:])
	return tcp.IsChecksumValid(tcpip.AddrFrom16(mtuSrc.As16()), tcpip.AddrFrom16(mtuDst.As16()), checksum.Checksum(tcp.Payload(), 0), uint16(len(tcp.Payload())))
}

func TestClampMSS(t *testing.T) {
	mss := func(v uint16) []byte {
		return append([]byte{header.TCPOptionMSS, 4}, binary.BigEndian.AppendUint16(nil, v)...)
	}
	tests := map[string]struct {
		options []byte
		want    uint16 // announced afterwards, 0 for none
	}{
		"large":         {mss(16324), tcpMSS},
		"largest":       {mss(65535), tcpMSS},
		"just right":    {mss(tcpMSS), tcpMSS},
		"small":         {mss(536), 536},
		"after others":  {append([]byte{header.TCPOptionNOP, header.TCPOptionWS, 3, 7}, mss(9000)...), tcpMSS},
		"none":          {nil, 0},
		"cut short":     {[]byte{header.TCPOptionNOP, header.TCPOptionNOP, header.TCPOptionMSS, 4}, 0},
		"length zero":   {[]byte{header.TCPOptionWS, 0, 0, 0}, 0},
		"past the end":  {[]byte{header.TCPOptionWS, 200, 0, 0}, 0},
		"after the end": {append([]byte{header.TCPOptionEOL, 0, 0, 0}, mss(9000)...), 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			pkt := synPacket(tt.options...)
			clampMSS(pkt)
			if !validTCP(pkt) {
				t.Error("the checksum is wrong afterwards")
			}
			if tt.want == 0 {
				return
			}
			if got := header.ParseSynOptions(header.TCP(pkt[header.IPv6MinimumSize:]).Options(), false).MSS; got != tt.want {
				t.Errorf("MSS %d, want %d", got, tt.want)
			}
		})
	}
}

func FuzzClampMSS(f *testing.F) {
	f.Add(synPacket(header.TCPOptionMSS, 4, 0x40, 0))
	f.Add(synPacket(header.TCPOptionWS, 0))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, pkt []byte) {
		size := len(pkt)
		clampMSS(pkt)
		if len(pkt) != size {
			t.Error("length changed")
		}
	})
}

func TestTooBigMessage(t *testing.T) {
	for _, size := range []int{60, directMTU, 60000} {
		msg := tooBigMessage(make([]byte, size), mtuDst, mtuSrc)
		ip := header.IPv6(msg)
		if len(msg) > header.IPv6MinimumMTU || !ip.IsValid(len(msg)) {
			t.Errorf("message about %d bytes has %d", size, len(msg))
		}
		icmp := header.ICMPv6(ip.Payload())
		sum := icmp.Checksum()
		icmp.SetChecksum(0)
		want := header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: ip.SourceAddress(), Dst: ip.DestinationAddress()})
		if icmp.Type() != header.ICMPv6PacketTooBig || icmp.MTU() != directMTU || sum != want {
			t.Errorf("type %d, MTU %d, checksum %#x, want %#x", icmp.Type(), icmp.MTU(), sum, want)
		}
	}
}

func TestNarrowedIsBounded(t *testing.T) {
	n := newNarrowed()
	now := time.Unix(1, 0)
	for i := range 3 * maxNarrowed {
		n.due(flow{src: netip.AddrPortFrom(mtuSrc, uint16(i)), dst: netip.AddrPortFrom(mtuDst, uint16(i>>16+1))}, now)
	}
	if len(n.told) > maxNarrowed {
		t.Errorf("%d connections are remembered", len(n.told))
	}
	f := flow{src: netip.AddrPortFrom(mtuSrc, 1), dst: netip.AddrPortFrom(mtuDst, 9)}
	told := 0
	for range 100 {
		now = now.Add(tooBigEvery)
		if n.due(f, now) {
			told++
		}
	}
	if told == 0 || told > 5 {
		t.Errorf("a connection was told %d times", told)
	}
}

// TestLargePacketsByRelayOnly sees large packets through the relay, and none
// once the same connection goes directly.
func TestLargePacketsByRelayOnly(t *testing.T) {
	r := startRelay(t, nil)
	agent, client := pair(t, mapOf(r.region(1)), Config{}, Config{RelayOnly: true})
	serveEcho(t, agent, 1)
	c, err := client.DialTCP(awaited(t, client, agent), agent.port(1))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	perPacket := func() int64 {
		client.Stats()
		roundTrip(t, c, 4<<20)
		s := client.Stats()
		return s.RxBytes / max(s.RxPackets, 1)
	}
	if relayed := perPacket(); relayed < 2*directMTU {
		t.Errorf("packets through the relay have %d bytes on average", relayed)
	}
	client.SetRelayOnly(false)
	awaitPath(t, client, agent.addr(), true, 10*time.Second)
	roundTrip(t, c, 4<<20) // the move itself
	if direct := perPacket(); direct > directMTU {
		t.Errorf("packets on the direct path have %d bytes on average", direct)
	}

	fresh, err := client.DialTCP(within(t, 5*time.Second), agent.port(1))
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	client.Stats()
	roundTrip(t, fresh, 1<<20)
	if s := client.Stats(); s.RxBytes/max(s.RxPackets, 1) > directMTU {
		t.Errorf("a connection begun on the direct path has packets of %d bytes on average", s.RxBytes/s.RxPackets)
	}
}
