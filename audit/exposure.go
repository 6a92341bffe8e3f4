package audit

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
)

// An Exposure is that a client resolved or fetched a digest. It is about people:
// it is kept for a while in ordinary tables, and never part of the log.
type Exposure struct {
	Digest   digest.Digest `json:"digest"`
	Client   string        `json:"client"` // its address
	User     string        `json:"user"`   // "" when clients do not log in
	Ref      string        `json:"ref"`    // the tag by which it was resolved, else upstream/repository
	First    time.Time     `json:"first"`
	Last     time.Time     `json:"last"`
	Resolves int64         `json:"resolves"` // tag -> digest
	Fetches  int64         `json:"fetches"`  // the manifest of the digest was sent
}

// A Visit is one request of a client for a manifest.
type Visit struct {
	Digest     digest.Digest
	Client     string
	User       string
	Upstream   string
	Repository string
	Tag        string // "" for a request by digest
	Fetched    bool   // the manifest was sent
}

// Pulled is a ref that clients resolved lately.
type Pulled struct {
	Ref     Ref
	Clients int // different addresses
}

// An ExposureStore keeps exposures.
type ExposureStore interface {
	// AddExposures adds to what is kept of the same digest, client, user and ref.
	AddExposures(ctx context.Context, batch []Exposure) error

	// ForgetExposures removes those whose last time is before a time.
	ForgetExposures(ctx context.Context, before time.Time) error
}

// Exposures notes who resolved and fetched what, off the path of a pull, and
// writes it down in batches. A crash loses the last seconds of it.
type Exposures struct {
	store ExposureStore
	keep  time.Duration
	now   func() time.Time
	log   zerolog.Logger

	mu       sync.Mutex
	batch    map[exposureKey]*Exposure
	resolved map[resolveKey]resolved // lately, to join a fetch by digest with its tag
	lost     int64                   // visits that did not fit
}

type exposureKey struct {
	digest            digest.Digest
	client, user, ref string
}

type resolveKey struct {
	digest               digest.Digest
	client, user         string
	upstream, repository string
}

type resolved struct {
	tag string
	at  time.Time
}

const (
	exposureFlush = 2 * time.Second
	exposureJoin  = 10 * time.Minute // clients HEAD the tag and GET the digest
	exposureMost  = 1 << 16          // distinct exposures in a batch, resolves to join: about 20 MB each
	exposureTrim  = time.Hour
)

// NewExposures returns the exposures in a store, which are kept for a time. now
// is the clock, nil for time.Now. It starts nothing.
func NewExposures(store ExposureStore, keep time.Duration, now func() time.Time, log zerolog.Logger) *Exposures {
	if now == nil {
		now = time.Now
	}
	return &Exposures{
		store: store, keep: keep, now: now, log: log,
		batch: make(map[exposureKey]*Exposure), resolved: make(map[resolveKey]resolved),
	}
}

// Note notes a visit. It does not wait for anything.
func (x *Exposures) Note(v Visit) {
	now := x.now().UTC().Truncate(time.Millisecond)
	name := v.Upstream + "/" + v.Repository
	r := resolveKey{v.Digest, v.Client, v.User, v.Upstream, v.Repository}
	x.mu.Lock()
	defer x.mu.Unlock()
	tag := v.Tag
	if tag != "" {
		if _, known := x.resolved[r]; known || len(x.resolved) < exposureMost {
			x.resolved[r] = resolved{tag, now}
		}
	} else if before, ok := x.resolved[r]; ok && now.Sub(before.at) <= exposureJoin {
		tag = before.tag
	}
	if tag != "" {
		name += ":" + tag
	}
	key := exposureKey{v.Digest, v.Client, v.User, name}
	e := x.batch[key]
	if e == nil {
		if len(x.batch) >= exposureMost {
			x.lost++
			return
		}
		e = &Exposure{Digest: v.Digest, Client: v.Client, User: v.User, Ref: name, First: now}
		x.batch[key] = e
	}
	e.Last = now
	if v.Tag != "" {
		e.Resolves++
	}
	if v.Fetched {
		e.Fetches++
	}
}

// Run writes down what was noted until ctx ends, and what is left then.
func (x *Exposures) Run(ctx context.Context) error {
	flush := time.NewTicker(exposureFlush)
	defer flush.Stop()
	trim := time.NewTicker(exposureTrim)
	defer trim.Stop()
	x.Forget(ctx)
	for {
		select {
		case <-flush.C:
			x.Flush(ctx)
		case <-trim.C:
			x.Forget(ctx)
		case <-ctx.Done():
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			x.Flush(ctx)
			return nil
		}
	}
}

// Flush writes down what was noted so far. What cannot be written waits for the
// next time, while there is room.
func (x *Exposures) Flush(ctx context.Context) {
	x.mu.Lock()
	noted, lost := x.batch, x.lost
	x.batch, x.lost = make(map[exposureKey]*Exposure), 0
	maps.DeleteFunc(x.resolved, func(_ resolveKey, r resolved) bool { return x.now().Sub(r.at) > exposureJoin })
	x.mu.Unlock()
	if lost > 0 {
		x.log.Warn().Int64("visits", lost).Msg("too many clients at once: some pulls are missing from the exposures")
	}
	if len(noted) == 0 {
		return
	}
	batch := make([]Exposure, 0, len(noted))
	for _, e := range noted {
		batch = append(batch, *e)
	}
	err := x.store.AddExposures(ctx, batch)
	if err == nil {
		return
	}
	x.log.Warn().Err(err).Msg("who pulled what could not be written down yet")
	x.mu.Lock()
	defer x.mu.Unlock()
	for key, e := range noted {
		if later := x.batch[key]; later != nil {
			later.First, later.Resolves, later.Fetches = e.First, later.Resolves+e.Resolves, later.Fetches+e.Fetches
		} else if len(x.batch) < exposureMost {
			x.batch[key] = e
		}
	}
}

// Forget removes what was kept for long enough.
func (x *Exposures) Forget(ctx context.Context) {
	if err := x.store.ForgetExposures(ctx, x.now().Add(-x.keep)); err != nil && ctx.Err() == nil {
		x.log.Warn().Err(err).Msg("old exposures could not be forgotten; it is tried again in an hour")
	}
}

// Exposed counts who got a digest, without saying who.
type Exposed struct {
	Clients  int        `json:"clients"` // different addresses
	Resolves int64      `json:"resolves"`
	Fetches  int64      `json:"fetches"`
	First    *time.Time `json:"first,omitempty"`
	Last     *time.Time `json:"last,omitempty"`
}

// CountExposed sums exposures of one digest.
func CountExposed(list []Exposure) (x Exposed) {
	clients := make(map[string]bool)
	for _, e := range list {
		clients[e.Client] = true
		x.Resolves += e.Resolves
		x.Fetches += e.Fetches
		if x.First == nil || e.First.Before(*x.First) {
			x.First = &e.First
		}
		if x.Last == nil || e.Last.After(*x.Last) {
			x.Last = &e.Last
		}
	}
	x.Clients = len(clients)
	return x
}
