package admin

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/diff"
	"tidemark/cache"
)

// openAPI describes the API.
//
//go:embed openapi.json
var openAPI []byte

// History is the answer of GET /api/v1/tags/history.
type History struct {
	Ref     string  `json:"ref"`
	History []Stint `json:"history"` // what was recorded here, newest first; then what others say, newest first
	Next    *int64  `json:"next,omitempty"`
}

// Stint is a time in which a tag meant one digest.
type Stint struct {
	Digest        digest.Digest  `json:"digest"`
	MediaType     string         `json:"media_type"`
	NotBefore     *time.Time     `json:"not_before"` // the last answer that confirmed the digest before, null for the first
	FirstSeen     time.Time      `json:"first_seen"`
	LastConfirmed time.Time      `json:"last_confirmed"`
	Ended         *time.Time     `json:"ended,omitempty"`
	EndReason     string         `json:"end_reason,omitempty"` // the type of the event that ended it
	Index         int64          `json:"index"`                // of the event that began it
	Basis         string         `json:"basis"`                // observed, imported or upstream-asserted
	Source        string         `json:"source,omitempty"`     // whose word it is that this log has no events of
	Bytes         cache.Presence `json:"bytes"`
	Diff          digest.Digest  `json:"diff,omitempty"` // content: what changed from the one before
}

func parseRef(q url.Values) (audit.Ref, error) {
	ref, err := audit.ParseRef(q.Get("ref"))
	if err != nil {
		return ref, badRequest("ref: %v", err)
	}
	return ref, nil
}

func parseDigest(key, s string) (digest.Digest, error) {
	d, err := digest.Parse(s)
	if err != nil {
		return "", badRequest("%s %.200q is not a digest: %v", key, s, err)
	}
	return d, nil
}

func (h *Handler) history(r *http.Request) (any, error) {
	q := r.URL.Query()
	ref, err := parseRef(q)
	if err != nil {
		return nil, err
	}
	n, err := limit(q)
	if err != nil {
		return nil, err
	}
	var before *int64
	if s := q.Get("after"); s != "" {
		index, err := strconv.ParseInt(s, 10, 64)
		if err != nil || index < 0 {
			return nil, badRequest("after %.50q is not an index", s)
		}
		before = &index
	}
	stints, err := h.o.History(r.Context(), ref, audit.HistoryQuery{Before: before, Limit: n + 1})
	if err != nil {
		return nil, err
	}
	claims, err := h.o.Claims(r.Context(), ref)
	if err != nil {
		return nil, err
	}
	if len(stints) == 0 && len(claims) == 0 && before == nil {
		return nil, &audit.NeverSeenError{Ref: ref}
	}
	out := History{Ref: ref.String(), History: []Stint{}}
	for _, st := range stints {
		if st.Ended == nil {
			st.LastConfirmed = h.o.Ledger.LastConfirmed(ref, st.LastConfirmed)
		}
		if len(out.History) == n {
			out.Next = &out.History[n-1].Index
			break
		}
		out.History = append(out.History, Stint{
			Digest: st.Digest, MediaType: st.MediaType, NotBefore: st.NotBefore, FirstSeen: st.FirstSeen, LastConfirmed: st.LastConfirmed,
			Ended: st.Ended, EndReason: st.EndReason, Index: st.Index, Basis: st.Basis, Bytes: h.o.Cache.Presence(st.Digest), Diff: st.Diff,
		})
	}
	if out.Next == nil {
		for _, c := range claims {
			if c.Served {
				continue // that is what was given, not what it meant
			}
			out.History = append(out.History, Stint{
				Digest: c.Digest, MediaType: c.MediaType, NotBefore: c.NotBefore, FirstSeen: c.Since, LastConfirmed: c.LastConfirmed,
				Ended: c.Until, EndReason: c.EndReason, Index: c.Index, Basis: c.Basis, Source: c.Source, Bytes: h.o.Cache.Presence(c.Digest),
			})
		}
	}
	return out, nil
}

// Decision is the body of POST /api/v1/tags/{approve,reject,hold,release}.
type Decision struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest,omitempty"`
	Reason string `json:"reason"`
}

func (h *Handler) decide(r *http.Request, action string) (any, error) {
	var in Decision
	if err := body(r, &in); err != nil {
		return nil, err
	}
	ref, err := audit.ParseRef(in.Ref)
	if err != nil {
		return nil, badRequest("ref: %v", err)
	}
	d := audit.Decision{Action: action, Reason: in.Reason}
	switch {
	case in.Digest != "" && action == audit.Release:
		return nil, badRequest("digest: a release is of the tag, whatever is held")
	case in.Digest != "" || action == audit.Approve || action == audit.Reject:
		if d.Digest, err = parseDigest("digest", in.Digest); err != nil {
			return nil, err
		}
	}
	if err := h.serveable(r.Context(), ref, d); err != nil {
		return nil, err
	}
	s, err := h.o.Ledger.Decide(r.Context(), ref, d)
	if err != nil {
		return nil, err
	}
	return describeTag(h.o.Ledger.Tag(ref, s)), nil
}

// serveable refuses to serve another digest whose bytes are not all to be had: what
// cannot be pulled would be an error. What is not here is fetched first. What has
// no room here is still upstream when it is approved, but need not be when it is
// gone back to.
func (h *Handler) serveable(ctx context.Context, ref audit.Ref, d audit.Decision) error {
	if d.Action != audit.Approve && (d.Action != audit.HoldAt || d.Digest == "") {
		return nil
	}
	if err := h.o.Ledger.Try(ctx, ref, d); err != nil {
		return err
	}
	err := h.o.Contents.Complete(ctx, ref, d.Digest)
	if err != nil && !(d.Action == audit.Approve && errors.Is(err, cache.ErrNoRoom)) {
		return &Error{http.StatusConflict, "bytes_gone", fmt.Sprintf("%s cannot be served: its bytes are not all here, and not to be had: %v", d.Digest, err)}
	}
	return nil
}

func (h *Handler) diff(r *http.Request) (any, error) {
	q := r.URL.Query()
	old, err := parseDigest("old", q.Get("old"))
	if err != nil {
		return nil, err
	}
	next, err := parseDigest("new", q.Get("new"))
	if err != nil {
		return nil, err
	}
	var ref audit.Ref
	if q.Has("ref") {
		if ref, err = parseRef(q); err != nil {
			return nil, err
		}
	} else if ref, err = h.o.RefOf(r.Context(), next); err != nil {
		if ref, err = h.o.RefOf(r.Context(), old); err != nil {
			return nil, err
		}
	}
	d, err := h.o.Contents.Diff(r.Context(), ref, old, next)
	if err != nil {
		return nil, &Error{http.StatusNotFound, "not_comparable", err.Error()}
	}
	if p := q.Get("platform"); p != "" {
		all := slices.Concat(d.Platforms.Added, d.Platforms.Removed, d.Platforms.Changed, d.Platforms.Unchanged)
		if !slices.Contains(all, p) {
			return nil, badRequest("platform %.100q is in neither: they have %s", p, strings.Join(all, ", "))
		}
		d.Changed = slices.DeleteFunc(d.Changed, func(c diff.PlatformDiff) bool { return c.Platform != p })
	}
	return d, nil
}

// Exposure is the answer of GET /api/v1/exposure.
type Exposure struct {
	Digest  digest.Digest `json:"digest"`
	Clients []Client      `json:"clients"`
	Total   int           `json:"total"`
}

// Client is who resolved or fetched a digest.
type Client struct {
	Client   string    `json:"client"`
	User     string    `json:"user"`
	Refs     []string  `json:"refs"`
	First    time.Time `json:"first"`
	Last     time.Time `json:"last"`
	Resolves int64     `json:"resolves"`
	Fetches  int64     `json:"fetches"`
}

func (h *Handler) exposure(r *http.Request) (any, error) {
	d, err := parseDigest("digest", r.URL.Query().Get("digest"))
	if err != nil {
		return nil, err
	}
	h.o.FlushExposures(r.Context())
	rows, err := h.o.Exposures(r.Context(), d)
	if err != nil {
		return nil, err
	}
	out := Exposure{Digest: d, Clients: []Client{}}
	for _, x := range rows { // sorted by client, user and ref
		last := len(out.Clients) - 1
		if last < 0 || out.Clients[last].Client != x.Client || out.Clients[last].User != x.User {
			out.Clients = append(out.Clients, Client{Client: x.Client, User: x.User, First: x.First, Last: x.Last})
			last++
		}
		c := &out.Clients[last]
		c.Refs = append(c.Refs, x.Ref)
		c.Resolves += x.Resolves
		c.Fetches += x.Fetches
		if x.First.Before(c.First) {
			c.First = x.First
		}
		if x.Last.After(c.Last) {
			c.Last = x.Last
		}
	}
	out.Total = len(out.Clients)
	return out, nil
}

func (h *Handler) conditions(r *http.Request) (any, error) {
	n, err := limit(r.URL.Query())
	if err != nil {
		return nil, err
	}
	cs, err := h.o.Conditions(r.Context(), n)
	return struct {
		Conditions []audit.Condition `json:"conditions"`
	}{nonNil(cs)}, err
}

// PolicyTest is the body of POST /api/v1/policy/test.
type PolicyTest struct {
	Config string     `json:"config"`          // YAML; "" is the policy that decides now
	Since  *time.Time `json:"since,omitempty"` // null is everything that is recorded
}

// PolicyResult is its answer: what the policy would have held back.
type PolicyResult struct {
	Held   []Withholding      `json:"held"`
	Counts map[audit.Mode]int `json:"counts"`
}

// Withholding is a digest that would not have been served for a while.
type Withholding struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"`
	Rule   string        `json:"rule"`
	Mode   audit.Mode    `json:"mode"`
	Since  time.Time     `json:"since"`
	Until  *time.Time    `json:"until,omitempty"` // null: it still would not be
	Index  int64         `json:"index"`
}

func (h *Handler) policyTest(r *http.Request) (any, error) {
	var in PolicyTest
	if err := body(r, &in); err != nil {
		return nil, err
	}
	policy := h.o.Ledger.Policy()
	if in.Config != "" {
		var err error
		if policy, err = h.o.ParsePolicy(in.Config); err != nil {
			return nil, badRequest("config: %v", err)
		}
	}
	since := time.Time{}
	if in.Since != nil {
		since = *in.Since
	}
	held, err := audit.Replay(policy, h.eachEntry(r.Context()), since, time.Now().UTC())
	if err != nil {
		return nil, err
	}
	out := PolicyResult{Held: []Withholding{}, Counts: make(map[audit.Mode]int)}
	for _, w := range held {
		out.Held = append(out.Held, Withholding{w.Ref.String(), w.Digest, w.Rule, w.Mode, w.Since, w.Until, w.Index})
		out.Counts[w.Mode]++
	}
	return out, nil
}

// entryPage is how many entries are read at a time.
const entryPage = 4096

// eachEntry yields the whole log.
func (h *Handler) eachEntry(ctx context.Context) iter.Seq2[audit.Entry, error] {
	return func(yield func(audit.Entry, error) bool) {
		after := int64(-1)
		for {
			page, err := h.o.Views.Events(ctx, audit.EventQuery{After: &after, Limit: entryPage})
			if err != nil {
				yield(audit.Entry{}, err)
				return
			}
			for _, e := range page {
				if !yield(e, nil) {
					return
				}
				after = e.Index
			}
			if len(page) < entryPage {
				return
			}
		}
	}
}
