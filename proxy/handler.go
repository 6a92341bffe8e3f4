// Package proxy answers a pull by asking two questions, each in the one place
// that knows: audit, which digest a tag means, and cache, where the bytes of
// that digest are.
package proxy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/route"
	"tidemark/proxy/upstream"
)

// Options configure a Handler. Everything but Observe is required.
type Options struct {
	Table     *route.Table
	Upstreams map[string]*upstream.Upstream // by name, all that Table knows
	Ledger    *audit.Ledger
	Cache     *cache.Cache
	Prefetch  bool // begin to fill an image's layers when its manifest is asked for

	// Login says who a client is, and whether it may enter at all. Nil lets
	// everybody in.
	Login func(*http.Request) (user string, ok bool)

	// Passthrough has the client's own rights at the upstream decide what it may
	// have, except at those that are Shared.
	Passthrough bool
	Shared      map[string]bool

	// Push passes what changes a repository on to its upstream.
	Push bool

	// TTL is how long a list of referrers is good.
	TTL time.Duration

	// Patience is how long a client waits for its answer to begin. Default 9.5 s.
	Patience time.Duration

	// Repositories are the repositories that the ledger knows, as
	// upstream/repository, sorted, n of those that follow after; only of some
	// upstreams unless these are nil.
	Repositories func(ctx context.Context, upstreams []string, after string, n int) ([]string, error)

	// KnownTags are the tags of a repository that the ledger knows, for when
	// upstream does not answer.
	KnownTags func(ctx context.Context, upstream, repository string) ([]string, error)

	// KnownTagsAt are those that had been seen at a moment.
	KnownTagsAt func(ctx context.Context, upstream, repository string, m audit.Moment) ([]string, error)

	// History is what a ref meant, newest first, and Chronicle all that is known of it,
	// from which the past is told.
	History   func(context.Context, audit.Ref, audit.HistoryQuery) ([]audit.Stint, error)
	Chronicle func(context.Context, audit.Ref) (audit.Chronicle, error)

	// Now is the clock by which the past is told. Default time.Now.
	Now func() time.Time

	// RefuseGaps refuses what a ref meant at a time of which that is not certain.
	RefuseGaps bool

	// KnownReferrers is what is known to refer to a manifest, and NoteReferrers
	// notes it, for when upstream does not answer.
	KnownReferrers func(ctx context.Context, upstream, repository string, subject digest.Digest) ([]audit.Referrer, error)
	NoteReferrers  NoteReferrers

	// OCITagHistory answers the history in the form that distribution-spec#606
	// proposes under the name it proposes, too.
	OCITagHistory bool

	// Observe, if set, is told what became of each request, once, after its
	// answer was written or given up.
	Observe func(*http.Request, Pull)
}

// A Pull is what a request asked for and where the answer came from. Fields
// that do not apply are empty.
type Pull struct {
	Kind     oci.Kind
	Upstream string
	Repo     string
	Tag      string
	Digest   digest.Digest
	User     string // who logged in
	Source   string // hit, join, fill, pass or stale
	Sent     bool   // the content was sent, not only described
	Err      error  // why it was refused or given up

	Unrecorded error // why what a push made of its tag is not in the ledger yet

	began time.Time
	begun bool        // a status was sent: an error can only abort
	late  *time.Timer // gives up on a pull that has not begun; nil if it may take its time
}

// begin notes that a status is about to be sent, unless it is too late for that.
func (p *Pull) begin() error {
	if p.late != nil && !p.late.Stop() {
		return errLate
	}
	p.begun = true
	return nil
}

// A Handler is the registry: the /v2 API of every upstream.
type Handler struct {
	o      Options
	rights *rights // nil unless clients' own rights count
	lists  referrerLists

	uploads [32]byte // key of the names of uploads that go on elsewhere
}

// New returns the handler that o describes.
func New(o Options) *Handler {
	if o.Observe == nil {
		o.Observe = func(*http.Request, Pull) {}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Patience == 0 {
		o.Patience = patience
	}
	h := &Handler{o: o, lists: referrerLists{known: lru[member, referrerList](referrersMost)}}
	_, _ = rand.Read(h.uploads[:]) // never fails
	if o.Passthrough {
		h.rights = newRights()
	}
	return h
}

// patience is how long a client waits for an answer or a refusal, whatever upstream
// does: it must have one before it gives up on us (containerd waits for a mirror
// for 30 s, others for less). What is known of a tag is served a little before.
const patience = 9500 * time.Millisecond

// errLate is the cause of a pull that could not be answered in time. What it
// waited for goes on without it.
var errLate = fmt.Errorf("no answer could be had in time: %w", context.DeadlineExceeded)

// ServeHTTP answers a request of the /v2 API. It is the only place that looks
// at an error: nothing sent yet is an error for the client, something sent can
// only be cut off.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.answer(w, r, nil) }

// View answers like the handler itself, as things were at a moment.
func (h *Handler) View(m audit.Moment) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.answer(w, r, &view{moment: m, prefix: "/v2/"}) })
}

func (h *Handler) answer(w http.ResponseWriter, r *http.Request, v *view) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	p := Pull{began: time.Now()}
	late := time.AfterFunc(h.o.Patience, func() { cancel(errLate) })
	defer late.Stop()
	p.late = late
	p.Err = h.serve(w, r.WithContext(ctx), &p, v)
	if p.Err != nil && !p.begun && r.Context().Err() == nil {
		refuse(w, p)
		p.begun = true
		h.o.Observe(r, p)
		return
	}
	h.o.Observe(r, p)
	if p.Err != nil {
		panic(http.ErrAbortHandler)
	}
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request, p *Pull, v *view) error {
	w.Header()["Docker-Distribution-Api-Version"] = apiVersion
	path, v, err := h.viewed(r, v)
	var req oci.Request
	if err == nil {
		req, err = oci.Parse(r.Method, path)
	}
	p.Kind = req.Kind
	if h.o.Login != nil {
		user, ok := h.o.Login(r)
		if !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="tidemark"`)
			return &oci.Error{Status: http.StatusUnauthorized, Code: oci.Unauthorized, Message: "this mirror wants a name and a password of its own: log in to it"}
		}
		p.User = user
	}
	if err != nil {
		return err
	}
	switch req.Kind {
	case oci.Ping:
		return h.ping(w, r, p)
	case oci.Catalog:
		return h.catalog(w, r, p)
	}
	ns, hasNS, err := namespace(r.URL)
	if err != nil {
		return err
	}
	target, err := h.o.Table.Route(r.Host, ns, hasNS, req.Name)
	if err != nil {
		return err
	}
	if hasNS {
		w.Header().Set("OCI-Namespace", ns)
	}
	if v != nil && req.Kind == oci.Push {
		return errPast
	}
	asker, err := h.asker(r, target.Upstream)
	if err != nil {
		return err
	}
	repo := repository{
		Target: target, upstream: asker, cache: h.o.Cache, rights: h.rights, referrer: h.noteReferrer,
		until: p.began.Add(h.o.Patience * 9 / 10), view: v,
	}
	p.Upstream, p.Repo, p.Tag, p.Digest = target.Upstream, target.Repository, req.Tag, req.Digest
	switch req.Kind {
	case oci.Manifest:
		return h.manifest(w, r, repo, req, p)
	case oci.Blob:
		return h.blob(w, r, repo, req, p)
	case oci.TagList:
		return h.tags(w, r, repo, p)
	case oci.Referrers:
		return h.referrers(w, r, repo, req, p)
	case oci.TagHistory, oci.OCITagHistory:
		return h.tagHistory(w, r, repo, req, p)
	case oci.Push:
		return h.push(w, r, repo, req, p)
	}
	panic("proxy: no handler for requests of kind " + req.Kind.String())
}

// Header values that every answer of a kind shares.
var (
	apiVersion = []string{"registry/2.0"}
	immutable  = []string{"max-age=31536000, immutable"}
	rangeUnit  = []string{"bytes"}
	octets     = []string{"application/octet-stream"}
)

// namespace reads the ns parameter (distribution-spec, "Registry Proxying").
func namespace(u *url.URL) (ns string, ok bool, err error) {
	if u.RawQuery == "" {
		return "", false, nil
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "", false, &oci.Error{Status: http.StatusBadRequest, Code: oci.Unsupported, Message: "the query of the request is malformed"}
	}
	return q.Get("ns"), q.Has("ns"), nil
}

// manifest answers the two questions of every pull.
func (h *Handler) manifest(w http.ResponseWriter, r *http.Request, repo repository, req oci.Request, p *Pull) error {
	ctx, dgst := r.Context(), req.Digest
	if err := repo.mayRead(ctx, oci.Manifest, req.Tag, dgst); err != nil {
		return err
	}
	var (
		ans     audit.Answer
		m       *cache.Manifest
		outcome cache.Outcome
		err     error
	)
	switch {
	case req.Tag != "" && repo.view != nil:
		return h.pastManifest(w, r, repo, req, p)
	case req.Tag != "":
		m, outcome, ans, err = h.resolved(ctx, repo, req.Tag)
		p.Digest = ans.Served
	default:
		if here, asks := h.asksFirst(repo, dgst); asks && r.Method == http.MethodHead {
			if err := h.headManifest(w, r, repo, dgst, p); err == nil || !here || !h.untold(repo, err) {
				return err
			}
		}
		m, outcome, err = h.o.Cache.Manifest(ctx, dgst, repo.manifest(dgst))
	}
	if err != nil {
		return err
	}
	head := w.Header()
	if req.Tag != "" {
		head["Tidemark-Log-Index"] = []string{strconv.FormatInt(ans.Index, 10)}
		if h := heldHeader(ans); h != nil {
			head["Tidemark-Held"] = h
		}
		head["Cache-Status"] = tagStatus(ans, outcome)
		p.Source = outcome.String()
		if ans.Stale != nil {
			p.Source = "stale"
		}
	} else {
		head["Cache-Control"] = immutable
		head["Cache-Status"] = contentStatus(outcome)
		p.Source = outcome.String()
	}
	return h.sendManifest(w, r, repo, m, p)
}

// sendManifest answers with a manifest that may be given.
func (h *Handler) sendManifest(w http.ResponseWriter, r *http.Request, repo repository, m *cache.Manifest, p *Pull) error {
	if h.o.Prefetch && !m.Index && r.Method == http.MethodGet {
		h.o.Cache.Prefetch(m, func(ref cache.Reference) cache.Source { return repo.blob(ref.Digest) })
	}
	describeContent(w.Header(), m.Digest, m.MediaType, int64(len(m.Body)))
	if err := p.begin(); err != nil {
		return err
	}
	if notModified(w, r, m.Digest) || r.Method == http.MethodHead {
		return nil
	}
	p.Sent = true
	_, err := w.Write(m.Body)
	return err
}

// resolved is the manifest that a tag means: the ledger says which, the cache has
// its bytes.
func (h *Handler) resolved(ctx context.Context, repo repository, tag string) (*cache.Manifest, cache.Outcome, audit.Answer, error) {
	ans, err := h.resolve(ctx, repo, tag)
	if err != nil {
		return nil, 0, ans, err
	}
	if !repo.isOpen() {
		// Upstream said once that the tag means it, perhaps long ago.
		repo.rights.join(member{repo.Upstream, repo.Repository, ans.Served})
	}
	m, outcome, err := h.o.Cache.Manifest(ctx, ans.Served, repo.manifest(ans.Served))
	return m, outcome, ans, err
}

// resolve asks the ledger what a tag means. A refusal is the one's who asked: others,
// who waited for the same answer, ask again for themselves.
func (h *Handler) resolve(ctx context.Context, repo repository, tag string) (audit.Answer, error) {
	ctx, cancel := repo.waiting(ctx)
	defer cancel()
	ans, err := h.o.Ledger.Resolve(ctx, repo.ref(tag), repo.ask(tag, "pull"))
	if ue := refusalIn(ans, err); ue != nil && ue.Caller != repo.upstream.Caller() {
		ans, err = h.o.Ledger.Resolve(ctx, repo.ref(tag), repo.ask(tag, "pull"))
	}
	if ue := refusalIn(ans, err); ue != nil && err == nil && ue.Caller == repo.upstream.Caller() && ue.Caller != "" && repo.rights != nil {
		// The client's right has ended, or the tag has: then it may still have the digest.
		repo.rights.revoke(repo.grant())
		if ue.Status != http.StatusNotFound || repo.mayRead(ctx, oci.Manifest, "", ans.Served) != nil {
			return audit.Answer{}, ue
		}
	}
	return ans, err
}

// refusalIn is what upstream refused when the ledger asked, told as an error or as
// why a known answer is stale; nil if it did not.
func refusalIn(ans audit.Answer, err error) *upstream.Error {
	if err == nil {
		err = ans.Stale
	}
	var ue *upstream.Error
	if errors.As(err, &ue) && (ue.Status == http.StatusUnauthorized || ue.Status == http.StatusForbidden || ue.Status == http.StatusNotFound) {
		return ue
	}
	return nil
}

// asksFirst tells whether a HEAD for content is upstream's to answer: it is not
// here, or somebody may want to know whether it must be pushed.
func (h *Handler) asksFirst(repo repository, dgst digest.Digest) (here, asks bool) {
	_, here = h.o.Cache.Stat(dgst)
	here = here && repo.proven(dgst) // else it is not for this client
	return here, !here || h.o.Push && !repo.upstream.IsOffline()
}

// untold tells whether upstream did not say if it has something: it was silent, or
// does not let us see, which is nothing to those who may have what is here.
func (h *Handler) untold(repo repository, err error) bool {
	var ue *upstream.Error
	refused := errors.As(err, &ue) && (ue.Status == http.StatusUnauthorized || ue.Status == http.StatusForbidden)
	return silent(err) || refused && repo.isOpen()
}

// headManifest answers a HEAD for a manifest that is not here without
// downloading it.
func (h *Handler) headManifest(w http.ResponseWriter, r *http.Request, repo repository, dgst digest.Digest, p *Pull) error {
	m, err := repo.upstream.HeadManifest(r.Context(), repo.Repository, dgst.String())
	if err != nil {
		return err
	}
	describeContent(w.Header(), dgst, m.MediaType, m.Size)
	w.Header()["Cache-Control"] = immutable
	w.Header()["Cache-Status"] = asked
	p.Source = cache.Pass.String()
	if err := p.begin(); err != nil {
		return err
	}
	notModified(w, r, dgst)
	return nil
}

func (h *Handler) blob(w http.ResponseWriter, r *http.Request, repo repository, req oci.Request, p *Pull) error {
	rng, err := parseRange(r)
	if err != nil {
		return err
	}
	if err := repo.mayRead(r.Context(), oci.Blob, "", req.Digest); err != nil {
		return err
	}
	w.Header()["Accept-Ranges"] = rangeUnit
	w.Header()["Cache-Control"] = immutable
	if r.Method == http.MethodHead || matches(r, req.Digest) {
		return h.headBlob(w, r, repo, req.Digest, p)
	}
	b, err := h.o.Cache.Get(r.Context(), req.Digest, repo.blob(req.Digest))
	if err != nil {
		return err
	}
	defer b.Close()
	if err := repo.mayHave(r.Context(), b); err != nil {
		return err
	}
	off, n, status := int64(0), b.Size, http.StatusOK
	if rng != nil && b.Size >= 0 {
		var ok bool
		if off, n, ok = rng.of(b.Size); !ok {
			w.Header().Set("Content-Range", "bytes */"+strconv.FormatInt(b.Size, 10))
			return &oci.Error{Status: http.StatusRequestedRangeNotSatisfiable, Code: oci.Unsupported, Message: "the range lies outside of the blob's " + strconv.FormatInt(b.Size, 10) + " bytes"}
		}
		status = http.StatusPartialContent
	}
	section, err := b.Section(r.Context(), off, n)
	if err != nil {
		return err
	}
	if status == http.StatusPartialContent {
		w.Header().Set("Content-Range", contentRange(off, n, b.Size))
	}
	p.Source = b.Outcome.String()
	describeContent(w.Header(), req.Digest, octets[0], n)
	w.Header()["Cache-Status"] = contentStatus(b.Outcome)
	if err := p.begin(); err != nil {
		return err
	}
	w.WriteHeader(status)
	_, err = section.WriteTo(w)
	p.Source = b.Outcome.String() // it may have changed half-way
	return err
}

// headBlob answers with the size of a blob, which upstream is asked for with a
// HEAD when it is not here.
func (h *Handler) headBlob(w http.ResponseWriter, r *http.Request, repo repository, dgst digest.Digest, p *Pull) error {
	size, _ := h.o.Cache.Stat(dgst)
	p.Source = cache.Hit.String()
	w.Header()["Cache-Status"] = contentStatus(cache.Hit)
	if here, asks := h.asksFirst(repo, dgst); asks {
		told, err := repo.upstream.HeadBlob(r.Context(), repo.Repository, dgst)
		switch {
		case err == nil:
			size = told
			p.Source = cache.Pass.String()
			w.Header()["Cache-Status"] = asked
		case !here || !h.untold(repo, err):
			return err
		}
	}
	describeContent(w.Header(), dgst, octets[0], size)
	if err := p.begin(); err != nil {
		return err
	}
	notModified(w, r, dgst)
	return nil
}
