package control

import (
	"context"

	"github.com/berthd/berth/control/coordinator"
	"github.com/berthd/berth/wire/tailnetpb"
)

// tailnetService answers one session's calls about the mesh.
type tailnetService struct {
	tailnetpb.DRPCTailnetUnimplementedServer // what is for clients only

	*Server
	peer coordinator.Peer
	// client is a person's end of the mesh, with a resume token that keeps its identity there. An agent's
	// identity is its id.
	client bool
	token  func() (*tailnetpb.RefreshResumeTokenResponse, error)
}

// Coordinate introduces the peer to others until either side ends the stream.
func (t *tailnetService) Coordinate(stream tailnetpb.DRPCTailnet_CoordinateStream) error {
	return t.coordinator.Serve(stream.Context(), t.peer, stream)
}

// StreamDERPMaps sends the relay map. It does not change while a server runs, so the stream then
// stays open and silent.
func (t *tailnetService) StreamDERPMaps(_ *tailnetpb.StreamDERPMapsRequest, stream tailnetpb.DRPCTailnet_StreamDERPMapsStream) error {
	if err := stream.Send(t.relayMap.Proto()); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// PostTelemetry takes what clients tell of their connections; nothing is made of it.
func (t *tailnetService) PostTelemetry(context.Context, *tailnetpb.TelemetryRequest) (*tailnetpb.TelemetryResponse, error) {
	return &tailnetpb.TelemetryResponse{}, nil
}

// RefreshResumeToken gives a client what it needs to come back as the same peer.
func (t *tailnetService) RefreshResumeToken(ctx context.Context, req *tailnetpb.RefreshResumeTokenRequest) (*tailnetpb.RefreshResumeTokenResponse, error) {
	if !t.client {
		return t.DRPCTailnetUnimplementedServer.RefreshResumeToken(ctx, req)
	}
	return t.token()
}
