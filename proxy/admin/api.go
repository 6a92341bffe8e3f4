package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
)

// Status is the answer of GET /api/v1/status.
type Status struct {
	Version   string           `json:"version"`
	Started   time.Time        `json:"started"`
	Cache     CacheStatus      `json:"cache"`
	Log       LogStatus        `json:"log"`
	Upstreams []UpstreamStatus `json:"upstreams"`
	Fills     []FillStatus     `json:"fills"`
	Policy    PolicyStatus     `json:"policy"`
	Warnings  []string         `json:"warnings"`

	// Offline tells that no upstream is ever asked.
	Offline bool `json:"offline"`

	Registry RegistryStatus `json:"registry"`
	Disk     DiskStatus     `json:"disk"`
}

// RegistryStatus tells how clients reach the registry, and what it asks of them.
type RegistryStatus struct {
	URL       string   `json:"url"`
	TLS       string   `json:"tls"`            // the mode
	Hosts     []string `json:"hosts"`          // that certificates are for
	Auth      string   `json:"auth"`           // the mode
	Clients   bool     `json:"client_ca"`      // clients must present a certificate
	Push      string   `json:"push"`           // deny or pass
	Intercept string   `json:"intercept"`      // address of the intercepting proxy, "" without one
	Upstream  []string `json:"upstream_hosts"` // request hosts that mean an upstream
}

// DiskStatus is about the file system of the data folder, in bytes.
type DiskStatus struct {
	Total   int64 `json:"total"`
	Free    int64 `json:"free"`
	MinFree int64 `json:"min_free"`
}

// UpstreamCheck is what an upstream answered when it was asked to see whether it
// does.
type UpstreamCheck struct {
	Name      string `json:"name"`
	Endpoint  string `json:"endpoint"`
	Anonymous Check  `json:"anonymous"`             // the registry itself, without credentials
	Own       *Check `json:"credentials,omitempty"` // with the configured ones
	Image     *Check `json:"image,omitempty"`       // the image that was asked about, as pulls ask

	RateLimitRemaining *int64  `json:"ratelimit_remaining,omitempty"`
	ClockAhead         float64 `json:"clock_ahead_seconds"`
}

// Check is one question and its answer.
type Check struct {
	Status int    `json:"status"` // of HTTP, 0 if there was no answer
	Error  string `json:"error,omitempty"`
	Millis int64  `json:"ms"`
}

// check asks upstreams whether they answer.
func (h *Handler) check(r *http.Request) (any, error) {
	var q struct {
		Image string `json:"image"`
	}
	if err := body(r, &q); err != nil {
		return nil, err
	}
	var ref *audit.Ref
	if q.Image != "" {
		parsed, err := audit.ParseRef(q.Image)
		if err != nil {
			return nil, badRequest("image: %v", err)
		}
		ref = &parsed
	}
	return struct {
		Upstreams []UpstreamCheck `json:"upstreams"`
	}{nonNil(h.o.Check(r.Context(), ref))}, nil
}

// PolicyStatus tells which policy decides.
type PolicyStatus struct {
	SHA256 string `json:"sha256"`

	// Refuses are the rules that answer with an error, which clients may get past.
	Refuses []string `json:"refuses"`
}

// CacheStatus tells how full the cache is and what it is good for.
type CacheStatus struct {
	Bytes      int64   `json:"bytes"`
	Blobs      int64   `json:"blobs"`
	Budget     int64   `json:"budget"`
	HitRatio   float64 `json:"hit_ratio"`   // of all content asked for since the start
	SavedBytes int64   `json:"saved_bytes"` // sent to clients and not fetched for them
	Indexed    bool    `json:"indexed"`     // false while the index is built after a start
}

// LogStatus tells how far the log is, and how far it is signed.
type LogStatus struct {
	Origin     string     `json:"origin"`
	Size       int64      `json:"size"`
	Root       tlog.Hash  `json:"root"`
	SignedSize int64      `json:"signed_size"`
	SignedAt   *time.Time `json:"signed_at,omitempty"`
}

// UpstreamStatus tells what the last requests to an upstream said.
type UpstreamStatus struct {
	Name               string `json:"name"`
	Healthy            bool   `json:"healthy"`
	LastError          string `json:"last_error,omitempty"`
	RateLimitRemaining *int64 `json:"ratelimit_remaining,omitempty"`

	// Condition is the trouble that it is in for longer, as /api/v1/conditions
	// has it.
	Condition *audit.Condition `json:"condition,omitempty"`
}

// FillStatus tells how far a download is. Size is -1 when not known.
type FillStatus struct {
	Digest  digest.Digest `json:"digest"`
	Size    int64         `json:"size"`
	Have    int64         `json:"have"`
	Readers int           `json:"readers"`
}

func (h *Handler) status(r *http.Request) (any, error) {
	tree, err := h.o.Entries.Tree(r.Context())
	if err != nil {
		return nil, err
	}
	c, signed := h.o.Cache.Stats(), h.o.Signer.Last()
	s := Status{
		Version: h.o.Version, Started: h.o.Started.UTC(),
		Cache:     CacheStatus{Bytes: c.Bytes, Blobs: c.Blobs, Budget: c.Budget, SavedBytes: c.SavedBytes, Indexed: c.Ready},
		Log:       LogStatus{Origin: h.o.Origin, Size: tree.N, Root: tree.Hash, SignedSize: signed.Tree.N},
		Upstreams: nonNil(h.o.Upstreams()),
		Policy:    PolicyStatus{h.o.Ledger.Policy().SHA256(), nonNil(h.o.Ledger.Policy().Refuses())},
		Fills:     []FillStatus{},
		Warnings:  nonNil(h.o.Warnings()),
		Offline:   h.o.Offline,
		Registry:  h.o.Registry,
		Disk:      h.o.Disk(),
	}
	if n := c.Hits + c.Misses; n > 0 {
		s.Cache.HitRatio = float64(c.Hits) / float64(n)
	}
	if !signed.At.IsZero() {
		s.Log.SignedAt = &signed.At
	}
	for _, f := range c.Fills {
		s.Fills = append(s.Fills, FillStatus(f))
	}
	return s, nil
}

// TagList is the answer of GET /api/v1/tags.
type TagList struct {
	Tags []Tag  `json:"tags"`
	Next string `json:"next,omitempty"`
}

// Tag is a ref and what it means.
type Tag struct {
	Ref           string        `json:"ref"`
	Head          digest.Digest `json:"head"`
	Served        digest.Digest `json:"served"`
	HeadSince     time.Time     `json:"head_since"`
	LastConfirmed time.Time     `json:"last_confirmed"`
	Mode          audit.Mode    `json:"mode"`
	Rule          string        `json:"rule,omitempty"`    // by which; none is the implicit last one
	Index         int64         `json:"index"`             // of the event by which served is served
	Held          *Held         `json:"held,omitempty"`    // what is not served, and why
	Deleted       *time.Time    `json:"deleted,omitempty"` // when upstream was found to have it no longer
	Settled       bool          `json:"settled"`           // the last move was confirmed by a later answer
}

// Held is what a tag means upstream and not here.
type Held struct {
	Digest digest.Digest `json:"digest"` // what is held back; the served one if only a hand holds the tag
	Since  time.Time     `json:"since"`
	Until  *time.Time    `json:"until,omitempty"` // when a rule serves it, if nothing happens until then
	Reason string        `json:"reason"`
	ByHand bool          `json:"by_hand,omitempty"` // an operator holds it; the reason is theirs
}

func describeTag(t audit.Tag) Tag {
	out := Tag{
		Ref: t.Ref.String(), Head: t.State.Head, Served: t.Serves(), HeadSince: t.State.HeadSince,
		LastConfirmed: t.State.LastConfirmed, Mode: t.Rule.Mode, Rule: t.Rule.Name, Index: t.State.Index, Settled: t.State.Settled(),
	}
	if !t.State.Deleted.IsZero() {
		out.Deleted = &t.State.Deleted
	}
	_, until, why := t.Withheld()
	if h := t.State.Hold; h != nil {
		out.Held = &Held{Digest: t.State.Head, Since: h.Since, Until: until, Reason: h.Reason, ByHand: true}
	} else if why != "" {
		out.Held = &Held{Digest: t.State.Head, Since: t.State.HeadSince, Until: until, Reason: why}
	}
	return out
}

// How many items a list has if it is not said, and at most.
const (
	defaultLimit = 100
	maxLimit     = 1000
)

func limit(q url.Values) (int, error) {
	s := q.Get("limit")
	if s == "" {
		return defaultLimit, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > maxLimit {
		return 0, badRequest("limit %.20q is not a number from 1 to %d", s, maxLimit)
	}
	return n, nil
}

func instant(q url.Values, key string) (time.Time, error) {
	s := q.Get(key)
	if s == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return time.Time{}, badRequest("%s %.50q is not a time such as 2026-07-01T12:00:00Z", key, s)
	}
	return t, nil
}

func (h *Handler) tags(r *http.Request) (any, error) {
	q := r.URL.Query()
	var query audit.TagQuery
	n, err := limit(q)
	if err != nil {
		return nil, err
	}
	if m := q.Get("match"); m != "" {
		if query.Match, err = audit.ParseGlob(m); err != nil {
			return nil, badRequest("match: %v", err)
		}
	}
	if held := q.Get("held"); held != "" {
		is, err := strconv.ParseBool(held)
		if err != nil {
			return nil, badRequest("held %.20q is neither true nor false", held)
		}
		query.Held = &is
	}
	if query.MovedSince, err = instant(q, "moved_since"); err != nil {
		return nil, err
	}
	if a := q.Get("after"); a != "" {
		if query.After, err = audit.ParseRef(a); err != nil {
			return nil, badRequest("after: %v", err)
		}
	}
	query.Limit = n + 1 // one more tells whether there is a next page
	tags, err := h.o.Views.Tags(r.Context(), query)
	if err != nil {
		return nil, err
	}
	list := TagList{Tags: []Tag{}}
	for _, t := range tags {
		if len(list.Tags) == n {
			list.Next = list.Tags[n-1].Ref
			break
		}
		list.Tags = append(list.Tags, describeTag(h.o.Ledger.Tag(t.Ref, t.State)))
	}
	return list, nil
}

// EventList is the answer of GET /api/v1/events.
type EventList struct {
	Events []Event `json:"events"`
	Next   *int64  `json:"next,omitempty"`
}

// Event is an entry of the log. Leaf holds the stored bytes verbatim.
type Event struct {
	Index int64           `json:"index"`
	Leaf  json.RawMessage `json:"leaf"`
}

// eventQuery reads which events are wanted.
func eventQuery(q url.Values) (audit.EventQuery, error) {
	query := audit.EventQuery{Type: audit.Type(q.Get("type"))}
	if s := q.Get("ref"); s != "" {
		ref, err := audit.ParseRef(s)
		if err != nil {
			return query, badRequest("ref: %v", err)
		}
		query.Ref = &ref
	}
	if query.Type != "" && !query.Type.Known() {
		return query, badRequest("type %.50q is not an event type", query.Type)
	}
	return query, nil
}

// eventOf shows an entry. One that is no JSON is none that was sealed.
func eventOf(e audit.Entry) (Event, error) {
	if !json.Valid(e.Leaf) {
		return Event{}, &Error{http.StatusInternalServerError, "ledger_damaged", fmt.Sprintf("entry %d is not what was sealed: tidemark verify says more", e.Index)}
	}
	return Event{e.Index, e.Leaf}, nil
}

func (h *Handler) events(r *http.Request) (any, error) {
	q := r.URL.Query()
	query, err := eventQuery(q)
	if err != nil {
		return nil, err
	}
	n, err := limit(q)
	if err != nil {
		return nil, err
	}
	if query.Since, err = instant(q, "since"); err != nil {
		return nil, err
	}
	if query.Until, err = instant(q, "until"); err != nil {
		return nil, err
	}
	if s := q.Get("after"); s != "" {
		a, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return nil, badRequest("after %.50q is not an index", s)
		}
		query.After = &a
	}
	switch q.Get("order") {
	case "", "asc":
	case "desc":
		query.Descending = true
	default:
		return nil, badRequest("order %.50q is neither asc nor desc", q.Get("order"))
	}
	query.Limit = n + 1
	entries, err := h.o.Views.Events(r.Context(), query)
	if err != nil {
		return nil, err
	}
	list := EventList{Events: []Event{}}
	for _, e := range entries {
		if len(list.Events) == n {
			list.Next = &list.Events[n-1].Index
			break
		}
		event, err := eventOf(e)
		if err != nil {
			return nil, err
		}
		list.Events = append(list.Events, event)
	}
	return list, nil
}

func (h *Handler) event(r *http.Request) (any, error) {
	index, err := strconv.ParseInt(r.PathValue("index"), 10, 64)
	if err != nil || index < 0 {
		return nil, badRequest("index %.50q is not the index of an entry", r.PathValue("index"))
	}
	e, err := h.entry(r.Context(), index)
	if err != nil {
		return nil, err
	}
	return eventOf(e)
}

// entry is an entry of the log.
func (h *Handler) entry(ctx context.Context, index int64) (e audit.Entry, err error) {
	if index < 0 {
		return e, badRequest("%d is not the index of an entry", index)
	}
	leaves, err := h.o.Entries.Leaves(ctx, index, 1)
	if errors.Is(err, fs.ErrNotExist) {
		return e, &Error{http.StatusNotFound, "not_found", fmt.Sprintf("the log has no entry %d yet", index)}
	}
	if err != nil {
		return e, err
	}
	return audit.Entry{Index: index, Leaf: leaves[0]}, nil
}
