package proxy

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"

	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
)

// Rights remember what upstreams said about clients that come with rights of
// their own: who may read a repository, for minutes, and which content a
// repository has. Content is kept once for all repositories, so both must be
// known before any of it is served: that a client may read a repository says
// nothing about a digest that only another one has.
//
// Nothing of it is written down: after a start upstream is asked again.
type rights struct {
	flights singleflight.Group // one question for each caller and path

	mu      sync.Mutex
	granted *simplelru.LRU[grant, time.Time] // until when
	limited *simplelru.LRU[grant, refusal]   // callers that upstream told to come back later
	refused *simplelru.LRU[question, refusal]
	members *simplelru.LRU[member, struct{}]
}

// A grant is that a caller may read a repository.
type grant struct{ caller, upstream, repository string }

// A question is what a caller wants to know about.
type question struct{ caller, upstream, path string }

// A member is content that upstream said a repository has, to somebody who may
// read it.
type member struct {
	upstream, repository string
	digest               digest.Digest
}

type refusal struct {
	err   error
	until time.Time
}

const (
	grantedFor  = 5 * time.Minute // about as long as a token of the Hub is valid
	refusedFor  = 3 * time.Second // a crowd of clients is told the same
	limitedMost = time.Minute     // that a caller is not asked for again, whatever upstream says
	grantsMost  = 1 << 16
	membersMost = 1 << 17
	refusedMost = 4096
)

func newRights() *rights {
	return &rights{granted: lru[grant, time.Time](grantsMost), limited: lru[grant, refusal](refusedMost), refused: lru[question, refusal](refusedMost), members: lru[member, struct{}](membersMost)}
}

func lru[K comparable, V any](size int) *simplelru.LRU[K, V] {
	l, err := simplelru.NewLRU[K, V](size, nil)
	if err != nil {
		panic("proxy: " + err.Error()) // the size is not positive
	}
	return l
}

// grant notes that upstream let a caller read something of a repository.
func (r *rights) grant(g grant) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.granted.Add(g, time.Now().Add(grantedFor))
}

// may tells whether a caller is known to be let in.
func (r *rights) may(g grant) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	until, ok := r.granted.Get(g)
	return ok && time.Now().Before(until)
}

// revoke forgets that a caller was let in.
func (r *rights) revoke(g grant) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.granted.Remove(g)
}

func (r *rights) join(m member) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members.Add(m, struct{}{})
}

func (r *rights) has(m member) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.members.Get(m)
	return ok
}

// ask asks upstream, once for all who want to know the same, and tells a refusal
// again for a while. A caller that is to come back later is not asked for before.
func (r *rights) ask(ctx context.Context, q question, lasts time.Duration, ask func(context.Context) error) error {
	caller := grant{caller: q.caller, upstream: q.upstream}
	r.mu.Lock()
	was, refused := r.refused.Get(q)
	limit, limited := r.limited.Get(caller)
	r.mu.Unlock()
	switch now := time.Now(); {
	case refused && now.Before(was.until):
		return was.err
	case limited && now.Before(limit.until):
		return limit.err
	}
	result := r.flights.DoChan(q.caller+" "+q.upstream+" "+q.path, func() (any, error) {
		err := ask(context.WithoutCancel(ctx)) // bounded by the upstream's own time-outs
		var ue *upstream.Error
		if !errors.As(err, &ue) {
			return nil, err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		switch ue.Status {
		case http.StatusUnauthorized, http.StatusForbidden:
			r.refused.Add(q, refusal{err, time.Now().Add(lasts)})
		case http.StatusTooManyRequests:
			r.limited.Add(caller, refusal{err, time.Now().Add(min(max(ue.RetryAfter, refusedFor), limitedMost))})
		}
		return nil, err
	})
	_, err := await(ctx, result)
	return err
}

// await waits for what many wait for, as long as the one of ctx does.
func await(ctx context.Context, result <-chan singleflight.Result) (any, error) {
	select {
	case r := <-result:
		return r.Val, r.Err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (r repository) grant() grant { return grant{r.upstream.Caller(), r.Upstream, r.Repository} }

// isOpen tells that nobody's own rights are in question.
func (r repository) isOpen() bool { return r.rights == nil }

// note keeps that upstream let the caller have content of this repository.
func (r repository) note(dgst digest.Digest) {
	if r.rights != nil {
		r.rights.grant(r.grant())
		r.rights.join(member{r.Upstream, r.Repository, dgst})
	}
}

// mayRead makes sure that the caller may have what reference names in this
// repository, a tag or a digest, before it is looked at whether it is here. What
// is not known is asked upstream with a HEAD and the caller's rights, so that
// whoever has none is told what upstream tells, in the time that upstream takes,
// and cannot tell what is here.
func (r repository) mayRead(ctx context.Context, kind oci.Kind, tag string, dgst digest.Digest) error {
	if r.rights == nil {
		return nil
	}
	own := r.upstream.Caller() == ""
	switch {
	case tag != "" && (own || r.rights.may(r.grant())):
		return nil
	case tag == "" && (own || r.rights.may(r.grant())) && r.proven(dgst):
		return nil
	}
	reference := tag
	if tag == "" {
		reference = dgst.String()
	}
	q := question{r.upstream.Caller(), r.Upstream, kind.String() + " " + r.Repository + " " + reference}
	return r.rights.ask(ctx, q, refusedFor, func(ctx context.Context) error {
		if kind == oci.Blob {
			return r.proveBlob(ctx, dgst)
		}
		return r.proveManifest(ctx, reference, dgst)
	})
}

// proveManifest asks for a manifest, and notes what upstream's answer proves. That
// there was an answer is none: it may be a page where people log in.
func (r repository) proveManifest(ctx context.Context, reference string, dgst digest.Digest) error {
	m, err := r.upstream.HeadManifest(ctx, r.Repository, reference)
	if err != nil {
		return err
	}
	if m.Digest == "" || m.MediaType == oci.DockerSchema1JWS {
		// An old registry: only the bytes tell.
		if m, err = r.upstream.GetManifest(ctx, r.Repository, reference); err != nil {
			return err
		}
		if err := r.check(m, reference); err != nil {
			return err
		}
		if m.Digest = digest.FromBytes(m.Body); dgst != "" {
			m.Digest = dgst.Algorithm().FromBytes(m.Body)
		}
	}
	if dgst != "" && m.Digest != dgst {
		return r.nonsense(reference, fmt.Errorf("it answers with %s", m.Digest))
	}
	r.note(m.Digest)
	return nil
}

// proveBlob asks for a blob. An answer that does not name its digest, as those of
// stores that upstream redirects to, proves something when it has the size of what is
// here; when nothing is here there is nothing to prove.
func (r repository) proveBlob(ctx context.Context, dgst digest.Digest) error {
	told, named, err := r.upstream.StatBlob(ctx, r.Repository, dgst)
	if err != nil {
		return err
	}
	size, here := r.cache.Stat(dgst)
	switch {
	case named, here && told == size:
		r.note(dgst)
	case here:
		return r.unproven(dgst)
	}
	return nil
}

// proven tells whether upstream is known to have content in this repository, if that
// is in question.
func (r repository) proven(dgst digest.Digest) bool {
	return r.rights == nil || r.rights.has(member{r.Upstream, r.Repository, dgst})
}

// unproven refuses what upstream only seems to have. It does not tell what is here.
func (r repository) unproven(dgst digest.Digest) error {
	return r.nonsense(dgst.String(), errors.New("its answer does not name the digest, and proves nothing"))
}

// mayHave is mayRead for a blob that was found here, or began to arrive, only after
// it was asked about.
func (r repository) mayHave(ctx context.Context, b *cache.Blob) error {
	if r.rights == nil || b.Outcome == cache.Fill || b.Outcome == cache.Pass {
		return nil // it is what upstream sent to this caller
	}
	if err := r.mayRead(ctx, oci.Blob, "", b.Digest); err != nil {
		return err
	}
	if !r.proven(b.Digest) {
		return r.unproven(b.Digest)
	}
	return nil
}

// mayList tells whether the caller is known to be let in, for answers that
// upstream cannot give at present.
func (r repository) mayList() bool {
	return r.rights == nil || r.upstream.Caller() == "" || r.rights.may(r.grant())
}

// callerName tells sources of different callers apart, and tells nothing else.
func callerName(caller string) string {
	if caller == "" {
		return ""
	}
	return " as client " + hex.EncodeToString([]byte(caller)[:4])
}

// challengeFor is how long what upstream asks of clients that log in is kept.
const challengeFor = 5 * time.Minute

// ping answers what clients ask first: whether they must log in. Where their
// rights at the upstream count, it is upstream that says so.
func (h *Handler) ping(w http.ResponseWriter, r *http.Request, p *Pull) error {
	ns, hasNS, err := namespace(r.URL)
	if err != nil {
		return err
	}
	if p.Upstream, err = h.o.Table.Upstream(r.Host, ns, hasNS); err != nil {
		return err
	}
	if hasNS {
		w.Header().Set("OCI-Namespace", ns)
	}
	if h.rights != nil {
		if err := h.mayEnter(r, p.Upstream); err != nil {
			return err
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if err := p.begin(); err != nil {
		return err
	}
	_, err = w.Write([]byte("{}"))
	return err
}

func (h *Handler) mayEnter(r *http.Request, name string) error {
	up, err := h.asker(r, name)
	if err != nil {
		return err
	}
	g := grant{up.Caller(), name, ""}
	if up.Caller() == "" || h.rights.may(g) {
		return nil
	}
	lasts := refusedFor
	if r.Header.Get("Authorization") == "" {
		lasts = challengeFor
	}
	return h.rights.ask(r.Context(), question{up.Caller(), name, ""}, lasts, func(ctx context.Context) error {
		if err := up.Ping(ctx); err != nil {
			return err
		}
		h.rights.grant(g)
		return nil
	})
}

// maxAuthorization bounds what a client may send as its credentials, in bytes.
// Registries take less in all the heads of a request.
const maxAuthorization = 32 << 10

// asker is an upstream as it is asked for a request: with the client's rights
// where these count, else with the configuration's.
func (h *Handler) asker(r *http.Request, name string) (*upstream.Upstream, error) {
	up := h.o.Upstreams[name]
	if h.rights == nil || h.o.Shared[name] {
		return up, nil
	}
	return as(up, r)
}

// as is an upstream asked with the rights of the client that sent a request.
func as(up *upstream.Upstream, r *http.Request) (*upstream.Upstream, error) {
	authorization := r.Header.Get("Authorization")
	if len(authorization) > maxAuthorization {
		return nil, &oci.Error{Status: http.StatusRequestHeaderFieldsTooLarge, Code: oci.Unauthorized, Message: fmt.Sprintf("the Authorization has %d bytes, more than the %d that are passed on", len(authorization), maxAuthorization)}
	}
	return up.As(authorization), nil
}
