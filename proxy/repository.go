package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/route"
	"tidemark/proxy/upstream"
)

// A repository is one repository of one upstream, as audit and cache fall back
// on it.
type repository struct {
	route.Target
	upstream *upstream.Upstream // asked with the rights that count
	cache    *cache.Cache
	rights   *rights // nil unless clients' own rights count

	referrer func(r repository, manifest []byte) // notes what a manifest refers to

	until time.Time // for so long upstream is waited for before what is known is told
	view  *view     // the moment that is asked about, nil for now
}

// path is where the requests of the repository go that are of some kind.
func (r repository) path(kind string) string {
	prefix := "/v2/"
	if r.view != nil {
		prefix = r.view.prefix
	}
	return prefix + r.Name + "/" + kind
}

// waiting bounds what is waited for before what is known is told instead.
func (r repository) waiting(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithDeadline(ctx, r.until)
}

func (r repository) ref(tag string) audit.Ref {
	return audit.Ref{Upstream: r.Upstream, Repository: r.Repository, Tag: tag}
}

// ask finds out what tag means upstream. A tag that is known is asked about
// with HEAD, which rate limits do not count, and a digest that is not known is
// fetched before it is believed. A tag never seen is asked for with a GET at
// once: its manifest is needed anyway. What made us ask is the trigger.
func (r repository) ask(tag, trigger string) audit.Ask {
	return func(ctx context.Context, q audit.Question) (audit.Observation, error) {
		seen, err := r.observe(ctx, tag, q)
		seen.Evidence.Trigger = trigger
		if moved := err == nil && q.Known.Known() && seen.Absent == nil && seen.Digest != q.Known.Head; moved && r.upstream.Caller() != "" {
			seen.Change = r.compare(ctx, q.Known.Head, seen.Digest) // what the client may see, the ledger may not
			if s := q.Known.Served; s != "" && s != q.Known.Head && s != seen.Digest {
				seen.Served = r.compare(ctx, s, seen.Digest)
			}
		}
		if q.Trust && err == nil && seen.Digest == q.Known.Head && r.upstream.Caller() == "" { // by a client's rights less may be there
			ctx, cancel := context.WithTimeout(ctx, compareTime)
			defer cancel()
			t, err := r.trust(ctx, seen.Digest)
			if seen.Unseen = err != nil; !seen.Unseen {
				seen.Trust = &t
			}
		}
		return seen, err
	}
}

func (r repository) observe(ctx context.Context, tag string, q audit.Question) (audit.Observation, error) {
	if !q.Known.Known() {
		return r.get(ctx, tag, []string{http.MethodGet})
	}
	claim, err := r.upstream.HeadManifest(ctx, r.Repository, tag)
	if err != nil {
		return r.absent(ctx, tag, q, err)
	}
	if claim.MediaType == oci.DockerSchema1JWS {
		claim.Digest = "" // it is not that of the bytes
	}
	switch claim.Digest {
	case "": // an old registry: only the bytes tell
		return r.get(ctx, tag, []string{http.MethodHead, http.MethodGet})
	case q.Known.Head:
		return r.observation(claim.Digest, q.Known.HeadMediaType, q.Known.HeadSize, claim.Edge, false, http.MethodHead), nil
	}
	tries := claimTries
	if q.Known.Refuses(claim.Digest) {
		tries = 1 // it is on the record that it could not be had
	}
	m, err := r.claimed(ctx, claim.Digest, tries)
	if err != nil {
		return audit.Observation{}, err
	}
	return r.observation(m.Digest, m.MediaType, int64(len(m.Body)), claim.Edge, true, http.MethodHead, http.MethodGet), nil
}

// Waits for a digest that upstream says a tag means, and does not have yet: what
// is pushed reaches the edges of some registries one after the other.
const (
	claimTries = 3
	claimWait  = 200 * time.Millisecond
)

// claimed fetches the manifest of a digest that upstream claims. One that it
// does not have, or whose bytes are others, is an upstream that contradicts itself.
func (r repository) claimed(ctx context.Context, dgst digest.Digest, tries int) (*cache.Manifest, error) {
	for try := 1; ; try++ {
		m, _, err := r.cache.Manifest(ctx, dgst, r.manifest(dgst))
		absent := errors.Is(err, fs.ErrNotExist)
		switch {
		case err == nil:
			return m, nil
		case errors.Is(err, cache.ErrMismatch), absent && try == tries:
			return nil, &audit.InconsistentError{Claimed: dgst, Err: fmt.Errorf("it cannot be had: %w", err)}
		case !absent:
			return nil, fmt.Errorf("the tag moved to %s, which cannot be had: %w", dgst, err)
		}
		select {
		case <-time.After(claimWait << try):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		r.upstream.Forget(r.Repository, dgst.String())
	}
}

// absent tells the answer that there is no such tag from trouble, and looks for
// another sign of it when it would be believed.
func (r repository) absent(ctx context.Context, tag string, q audit.Question, err error) (audit.Observation, error) {
	var ue *upstream.Error
	if !errors.As(err, &ue) || ue.Status != http.StatusNotFound || ue.Remembered || r.upstream.Caller() != "" {
		return audit.Observation{}, err // a client may be told so because it may not know
	}
	seen := r.observation("", "", 0, "", false, http.MethodHead)
	seen.Absent = err
	if q.Corroborate {
		gone, via := r.gone(ctx, tag)
		seen.Gone = gone
		seen.Evidence.Via = append(seen.Evidence.Via, via...)
	}
	return seen, nil
}

// tagPages bounds the pages of a list that is searched for a tag.
const tagPages = 100

// gone tells whether upstream's list of tags lacks tag, or it has no such
// repository at all although it answers to us (AUDIT.md, R6).
func (r repository) gone(ctx context.Context, tag string) (gone bool, via []string) {
	query := url.Values{"n": {"1000"}}
	for range tagPages {
		tags, next, err := r.upstream.Tags(ctx, r.Repository, query)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return r.upstream.Ping(ctx) == nil, []string{"tags/list", "ping"}
		case err != nil || slices.Contains(tags, tag):
			return false, []string{"tags/list"}
		case next == nil:
			return true, []string{"tags/list"}
		}
		query = next
	}
	return false, []string{"tags/list"}
}

// get asks with a GET by tag, and keeps the manifest under the digest of its
// own bytes. A header that claims another digest makes the answer nonsense.
func (r repository) get(ctx context.Context, tag string, via []string) (audit.Observation, error) {
	m, err := r.upstream.GetManifest(ctx, r.Repository, tag)
	if err != nil {
		return audit.Observation{}, err
	}
	if err := r.check(m, tag); err != nil {
		return audit.Observation{}, err
	}
	if m.Digest != "" && m.Digest == oci.SignedDigest(m.Body) {
		m.Digest = "" // right, but not the digest by which content can be kept
	}
	dgst := digest.FromBytes(m.Body)
	if m.Digest != "" {
		dgst = m.Digest.Algorithm().FromBytes(m.Body)
	}
	if m.Digest != "" && m.Digest != dgst {
		err := r.nonsense(tag, fmt.Errorf("its header says %s, its bytes are %s", m.Digest, dgst))
		return audit.Observation{}, &audit.InconsistentError{Claimed: m.Digest, Err: err}
	}
	kept, _, err := r.cache.Manifest(ctx, dgst, given{r.source("given"), m.Body})
	if err != nil {
		return audit.Observation{}, err
	}
	r.referrer(r, m.Body)
	return r.observation(dgst, kept.MediaType, int64(len(m.Body)), m.Edge, true, via...), nil
}

func (r repository) observation(dgst digest.Digest, mediaType string, size int64, edge string, verified bool, via ...string) audit.Observation {
	return audit.Observation{
		Digest: dgst, MediaType: mediaType, Size: size,
		Evidence: audit.Evidence{
			Via: via, BodyVerified: verified, AcceptProfile: oci.AcceptProfile, Identity: r.upstream.Identity(), Edge: edge,
		},
	}
}

// check refuses bytes that are no manifest before anyone believes them.
func (r repository) check(m upstream.Manifest, reference string) error {
	if _, err := oci.Describe(m.Body); err != nil {
		return r.nonsense(reference, err)
	}
	return nil
}

func (r repository) nonsense(reference string, err error) error {
	return &upstream.Error{Upstream: r.Upstream, Op: "GET " + r.Repository + " " + reference, Nonsense: true, Err: err}
}

// source names where content comes from, and as what: a repository that has no
// blob of a digest may have a manifest.
func (r repository) source(kind string) source {
	return source(kind + " of " + r.Upstream + "/" + r.Repository + callerName(r.upstream.Caller()))
}

type source string

// Name implements cache.Source.
func (s source) Name() string { return string(s) }

// manifest is the source of a manifest by digest.
func (r repository) manifest(dgst digest.Digest) cache.Source {
	return manifestSource{r.source("manifest"), r, dgst}
}

type manifestSource struct {
	source
	repo repository
	dgst digest.Digest
}

// Open implements cache.Source. Manifests are small: they always begin at 0.
func (s manifestSource) Open(ctx context.Context, _, _ int64) (*cache.Content, error) {
	m, err := s.repo.upstream.GetManifest(ctx, s.repo.Repository, s.dgst.String())
	if err != nil {
		return nil, err
	}
	if s.dgst.Algorithm().FromBytes(m.Body) == s.dgst { // else the fill says what is wrong
		if err := s.repo.check(m, s.dgst.String()); err != nil {
			return nil, err
		}
		s.repo.note(s.dgst)
		s.repo.referrer(s.repo, m.Body)
	}
	return given{s.source, m.Body}.Open(ctx, 0, -1)
}

// given is content that has arrived already.
type given struct {
	source
	body []byte
}

// Open implements cache.Source.
func (g given) Open(context.Context, int64, int64) (*cache.Content, error) {
	return &cache.Content{Body: io.NopCloser(bytes.NewReader(g.body)), Size: int64(len(g.body))}, nil
}

// blob is the source of a blob.
func (r repository) blob(dgst digest.Digest) cache.Source {
	src := blobSource{r.source("blob"), r, dgst}
	if r.isOpen() {
		return src
	}
	return provingSource{src}
}

// A provingSource proves, by all of a blob's bytes, that its repository has it.
type provingSource struct{ blobSource }

// Verified implements cache.Verified.
func (s provingSource) Verified() {
	s.repo.rights.join(member{s.repo.Upstream, s.repo.Repository, s.dgst}) // whether the caller still may is asked
}

type blobSource struct {
	source
	repo repository
	dgst digest.Digest
}

// Open implements cache.Source.
func (s blobSource) Open(ctx context.Context, off, n int64) (*cache.Content, error) {
	b, err := s.repo.upstream.GetBlob(ctx, s.repo.Repository, s.dgst, off, n)
	var ue *upstream.Error
	if errors.As(err, &ue) && ue.Status == http.StatusRequestedRangeNotSatisfiable {
		return nil, fmt.Errorf("%w: %w", cache.ErrRange, err)
	}
	if err != nil {
		return nil, err
	}
	return &cache.Content{Body: b.Body, Offset: b.Offset, Size: b.Size}, nil
}
