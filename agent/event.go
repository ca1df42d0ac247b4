package agent

import "time"

// Step names a point on the way from a started process to a workspace people can use.
type Step string

// The steps in the order in which they are first met. A step can come again: after a lost link the
// agent proves itself anew.
const (
	StepIdentity Step = "identity" // the machine's proof was read from its metadata service
	StepExchange Step = "exchange" // the server gave a session token for it
	StepLinked   Step = "linked"   // the control server accepted it and sent the manifest
	StepTailnet  Step = "tailnet"  // the agent is on the mesh
	StepReady    Step = "ready"    // everything is served and the start scripts have ended
	StepTrouble  Step = "trouble"  // an attempt to link failed; Cause and Fix say why
	StepLost     Step = "lost"     // the link was lost and is dialled again
	StepStopped  Step = "stopped"  // the agent has stopped
)

// Event tells one step as it happens. Encoded as JSON it is one line of --status-json.
type Event struct {
	Time time.Time `json:"time"`
	Step Step      `json:"step"`
	// Elapsed counts from the start of berthd, Took is how long the step itself took, both in
	// milliseconds. They are filled in by who knows them: the command line and the identity's source.
	Elapsed int64 `json:"elapsed_ms,omitempty"`
	Took    int64 `json:"took_ms,omitempty"`

	// AgentID and AgentName are set from StepLinked on.
	AgentID   string `json:"agent_id,omitempty"`
	AgentName string `json:"agent_name,omitempty"`
	// Path is "direct" or "relayed" with StepTailnet: whether peers can be met without the relay.
	Path string `json:"path,omitempty"`
	// Detail is one more fact in words, such as where the identity comes from or the lifecycle state.
	Detail string `json:"detail,omitempty"`
	// Cause and Fix are plain sentences, set with StepTrouble.
	Cause string `json:"cause,omitempty"`
	Fix   string `json:"fix,omitempty"`
}
