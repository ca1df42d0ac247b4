// Package store keeps what a control server must remember, in NATS JetStream: agents, the hashes of
// their tokens, what each last said of itself, its log, and the history of its apps, scripts and
// connections.
//
// [Open] starts a JetStream inside the process, with its files under one directory, or connects to
// an external cluster; everything above it is the same code. Small records live in key-value
// buckets, where writers agree by revision; what only ever grows lives in streams. Nothing is cached
// here, so any number of servers may share one cluster. [Store.AppendLogs] is the one
// subtle part: it stores each line of a spool once, whatever is resent.
package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Errors that callers tell apart.
var (
	// ErrNotFound means that there is no such record.
	ErrNotFound = errors.New("not found")
	// ErrExists means that the name or id is taken.
	ErrExists = errors.New("already exists")
	// ErrLogLimit means that an agent has used up [LogLimits.Total].
	ErrLogLimit = errors.New("log limit exceeded")
	// ErrDiskFull means that nothing more is written until there is space; reading goes on.
	ErrDiskFull = errors.New("disk full")
	// ErrLocked means that another server uses the data directory.
	ErrLocked = errors.New("data directory in use")
)

// LogLimits bounds what is kept of agents' logs.
type LogLimits struct {
	// Total is how many bytes of output one agent may log over its whole life before it is told to
	// stop for good, as a stock server does at 1 MiB. 0, the default, means never: berth forgets the
	// oldest lines instead (Keep), because an agent that is cut off takes with it exactly the lines
	// that people come to read, and a bound on disk does not need that.
	Total int64
	// Keep is how many bytes of output are kept for one agent before its oldest lines go; 0 means 64 MiB.
	Keep int64
	// Bytes bounds the log of all agents, Age the time a line is kept; 0 means 8 GiB (256 MiB when all
	// is in memory) and 30 days.
	Bytes int64
	Age   time.Duration
}

func (l LogLimits) withDefaults(memory bool) LogLimits {
	if l.Keep == 0 {
		l.Keep = 64 << 20
	}
	if l.Bytes == 0 && memory {
		l.Bytes = 256 << 20
	}
	if l.Bytes == 0 {
		l.Bytes = 8 << 30
	}
	if l.Age == 0 {
		l.Age = 30 * 24 * time.Hour
	}
	return l
}

// Options says where the state lives.
type Options struct {
	// Dir is where an embedded JetStream keeps its files; empty means in memory.
	Dir string
	// URL is an external NATS server or cluster ("nats://a:4222,nats://b:4222"); Dir is then unused.
	URL string
	// Replicas is how many servers of an external cluster hold each record; 0 means 1.
	Replicas int
	// TokenLife is how long an exchanged token lasts without a link; 0 means 24 hours.
	TokenLife time.Duration
	Logs      LogLimits
	Log       *slog.Logger
}

func (o Options) inMemory() bool { return o.Dir == "" && o.URL == "" }

// Store is the state of a control server. Its methods may be called at the same time.
type Store struct {
	opts  Options
	embed *embedded // nil with an external cluster
	nc    *nats.Conn
	js    jetstream.JetStream

	server, agents, names, instances, tokens, state, identity jetstream.KeyValue
	logs, history                                             jetstream.Stream

	closing  sync.Once
	closeErr error

	// appending serialises writers to one agent's log in this process, so that they seldom meet as
	// a failed revision; agents share locks by the last byte of their id.
	appending [64]sync.Mutex
}

// Names of buckets and streams, and what each holds. All begin with "berth" so that a cluster can
// be shared with other programs.
const (
	bucketServer    = "berth_server"    // name → the server's own id and keys
	bucketAgents    = "berth_agents"    // agent id → Agent
	bucketNames     = "berth_names"     // lower-case name → agent id
	bucketInstances = "berth_instances" // provider.hash(instance).agent id → empty
	bucketTokens    = "berth_tokens"    // hash.H → Token; agent.ID.H → its creation time
	bucketState     = "berth_state"     // agent id.part → what it last said
	bucketIdentity  = "berth_identity"  // machine.provider.hash(instance) → Machine; used.hash → Use, for a while

	streamLogs    = "berth_logs"
	streamHistory = "berth_history"
)

// markerTTL is how long the marker of a deleted key stays: long enough for every watcher to see it,
// short enough that tokens minted at each reconnect do not pile up.
const markerTTL = time.Hour

// Open makes the state ready, creating what is not there yet. Its errors name the cause: a full
// disk ([ErrDiskFull]), a directory in use ([ErrLocked]), a cluster out of reach.
func Open(ctx context.Context, opts Options) (_ *Store, err error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Replicas == 0 {
		opts.Replicas = 1
	}
	if opts.TokenLife == 0 {
		opts.TokenLife = 24 * time.Hour
	}
	opts.Logs = opts.Logs.withDefaults(opts.inMemory())
	s := &Store{opts: opts}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if opts.URL != "" {
		s.nc, err = connect(opts.URL, opts.Log)
	} else {
		s.embed, err = startEmbedded(opts.Dir, opts.Log)
		if err == nil {
			s.nc, err = s.embed.connect(opts.Log)
		}
	}
	if err != nil {
		return nil, err
	}
	// 10 s: a write waits for a cluster to elect a leader, but no caller waits for ever.
	if s.js, err = jetstream.New(s.nc, jetstream.WithDefaultTimeout(10*time.Second)); err != nil {
		return nil, fmt.Errorf("cannot use JetStream: %w", err)
	}
	if err := s.create(ctx); err != nil {
		return nil, fmt.Errorf("cannot prepare the store: %w", err)
	}
	return s, nil
}

// connect reaches an external cluster and keeps trying after it was lost.
func connect(url string, log *slog.Logger) (*nats.Conn, error) {
	nc, err := nats.Connect(url,
		nats.Name("berth"),
		nats.MaxReconnects(-1),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("lost the NATS cluster", "err", err)
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) { log.Info("NATS cluster is back") }),
		nats.ErrorHandler(natsErrors(log)),
	)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the NATS cluster at %s: %w", redactURL(url), err)
	}
	return nc, nil
}

func natsErrors(log *slog.Logger) nats.ErrHandler {
	return func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("NATS error", "err", err) }
}

// redactURL drops credentials from a NATS address list.
func redactURL(list string) string {
	parts := strings.Split(list, ",")
	for i, p := range parts {
		scheme, rest, ok := strings.Cut(p, "://")
		if !ok {
			scheme, rest = "nats", p
		}
		if at := strings.LastIndexByte(rest, '@'); at >= 0 {
			rest = rest[at+1:]
		}
		parts[i] = scheme + "://" + rest
	}
	return strings.Join(parts, ",")
}

func (s *Store) create(ctx context.Context) error {
	storage := jetstream.FileStorage
	if s.opts.inMemory() {
		storage = jetstream.MemoryStorage
	}
	for _, b := range []struct {
		name string
		kv   *jetstream.KeyValue
	}{
		{bucketServer, &s.server}, {bucketAgents, &s.agents}, {bucketNames, &s.names},
		{bucketInstances, &s.instances}, {bucketTokens, &s.tokens}, {bucketState, &s.state}, {bucketIdentity, &s.identity},
	} {
		kv, err := s.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: b.name, History: 1, Storage: storage, Replicas: s.opts.Replicas, LimitMarkerTTL: markerTTL,
		})
		if err != nil {
			return fmt.Errorf("bucket %s: %w", b.name, err)
		}
		*b.kv = kv
	}
	for _, c := range []struct {
		stream *jetstream.Stream
		config jetstream.StreamConfig
	}{
		{&s.logs, jetstream.StreamConfig{
			Name: streamLogs, Subjects: []string{logSubjects}, MaxBytes: s.opts.Logs.Bytes, MaxAge: s.opts.Logs.Age,
		}},
		{&s.history, jetstream.StreamConfig{
			Name: streamHistory, Subjects: []string{historySubjects}, MaxMsgsPerSubject: historyDepth, MaxAge: historyAge,
		}},
	} {
		c.config.Storage = storage
		c.config.Replicas = s.opts.Replicas
		c.config.AllowDirect = true
		stream, err := s.js.CreateOrUpdateStream(ctx, c.config)
		if err != nil {
			return fmt.Errorf("stream %s: %w", c.config.Name, err)
		}
		*c.stream = stream
	}
	return nil
}

// Conn returns the NATS connection, for what servers tell each other without storing it.
func (s *Store) Conn() *nats.Conn { return s.nc }

// Ping tells whether the state can be reached now.
func (s *Store) Ping(ctx context.Context) error {
	if _, err := s.js.AccountInfo(ctx); err != nil {
		return s.explain("reach the store", err)
	}
	return nil
}

// Close ends the store; state on disk is complete when it returns. Closing again does nothing.
func (s *Store) Close() error {
	s.closing.Do(func() {
		if s.nc != nil {
			s.nc.Close()
		}
		if s.embed != nil {
			s.closeErr = s.embed.close()
		}
	})
	return s.closeErr
}

// writable is asked before anything is stored.
func (s *Store) writable() error {
	if s.embed == nil {
		return nil
	}
	return s.embed.writable()
}

// explain turns an error of NATS into one that says what it means here.
func (s *Store) explain(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, jetstream.ErrKeyNotFound), errors.Is(err, jetstream.ErrMsgNotFound), errors.Is(err, jetstream.ErrNoKeysFound):
		return ErrNotFound
	case errors.Is(err, jetstream.ErrKeyExists):
		return ErrExists
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrNoStreamResponse), errors.Is(err, nats.ErrConnectionClosed):
		return fmt.Errorf("cannot %s: the store is not available: %w", doing, err)
	}
	return fmt.Errorf("cannot %s: %w", doing, err)
}

// get reads the record of a key.
func get[T any](ctx context.Context, s *Store, kv jetstream.KeyValue, key string) (v T, revision uint64, err error) {
	entry, err := kv.Get(ctx, key)
	if err != nil {
		return v, 0, s.explain("read "+kv.Bucket(), err)
	}
	if err := json.Unmarshal(entry.Value(), &v); err != nil {
		return v, 0, fmt.Errorf("cannot decode %s in %s: %w", key, kv.Bucket(), err)
	}
	return v, entry.Revision(), nil
}

// put writes the record of a key, whatever it was.
func put(ctx context.Context, s *Store, kv jetstream.KeyValue, key string, v any) error {
	value, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot encode %s: %w", key, err)
	}
	if err := s.writable(); err != nil {
		return err
	}
	_, err = kv.Put(ctx, key, value)
	return s.explain("write "+kv.Bucket(), err)
}

// create writes the record of a key that has none, else returns [ErrExists].
func create(ctx context.Context, s *Store, kv jetstream.KeyValue, key string, v any) error {
	value, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot encode %s: %w", key, err)
	}
	if err := s.writable(); err != nil {
		return err
	}
	_, err = kv.Create(ctx, key, value)
	return s.explain("write "+kv.Bucket(), err)
}

// maxConflicts is how often a change is tried again when another writer came first.
const maxConflicts = 16

// update changes the record of a key; change sees the zero value if there is none yet, and may run
// more than once. An error from it is returned and nothing is written.
func update[T any](ctx context.Context, s *Store, kv jetstream.KeyValue, key string, change func(*T) error) (T, error) {
	var zero T
	for range maxConflicts {
		v, revision, err := get[T](ctx, s, kv, key)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return zero, err
		}
		if err := change(&v); err != nil {
			return zero, err
		}
		value, err := json.Marshal(v)
		if err != nil {
			return zero, fmt.Errorf("cannot encode %s: %w", key, err)
		}
		if err := s.writable(); err != nil {
			return zero, err
		}
		if revision == 0 {
			_, err = kv.Create(ctx, key, value)
		} else {
			_, err = kv.Update(ctx, key, value, revision)
		}
		switch {
		case err == nil:
			return v, nil
		case !conflict(err):
			return zero, s.explain("write "+kv.Bucket(), err)
		}
	}
	return zero, fmt.Errorf("cannot write %s: other writers came first %d times", kv.Bucket(), maxConflicts)
}

// conflict tells whether another writer came first.
func conflict(err error) bool {
	if errors.Is(err, jetstream.ErrKeyExists) || errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return true
	}
	var api *jetstream.APIError
	return errors.As(err, &api) &&
		(api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// purge forgets a key; that there is none is no error.
func purge(ctx context.Context, s *Store, kv jetstream.KeyValue, key string) error {
	err := kv.Purge(ctx, key, jetstream.PurgeTTL(markerTTL))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil
	}
	return s.explain("delete from "+kv.Bucket(), err)
}

// keys lists the keys that match a pattern.
func keys(ctx context.Context, s *Store, kv jetstream.KeyValue, pattern string) ([]string, error) {
	lister, err := kv.ListKeysFiltered(ctx, pattern)
	if err != nil {
		return nil, s.explain("list "+kv.Bucket(), err)
	}
	defer lister.Stop()
	var found []string
	for key := range lister.Keys() {
		found = append(found, key)
	}
	return found, ctx.Err()
}

// all reads every record whose key matches a pattern.
func all[T any](ctx context.Context, s *Store, kv jetstream.KeyValue, pattern string) (map[string]T, error) {
	watcher, err := kv.Watch(ctx, pattern, jetstream.IgnoreDeletes())
	if err != nil {
		return nil, s.explain("list "+kv.Bucket(), err)
	}
	defer watcher.Stop()
	found := make(map[string]T)
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case entry, ok := <-watcher.Updates():
			if !ok {
				return nil, fmt.Errorf("cannot list %s: the store closed", kv.Bucket())
			}
			if entry == nil { // everything that was there has been seen
				return found, nil
			}
			var v T
			if err := json.Unmarshal(entry.Value(), &v); err != nil {
				return nil, fmt.Errorf("cannot decode %s in %s: %w", entry.Key(), kv.Bucket(), err)
			}
			found[entry.Key()] = v
		}
	}
}
