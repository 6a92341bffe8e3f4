// Package proxy answers a pull by asking two questions, each in the one place
// that knows: audit, which digest a tag means, and cache, where the bytes of
// that digest are.
package proxy

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"

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

	// KnownTags are the tags of a repository that the ledger knows, for when
	// upstream does not answer.
	KnownTags func(ctx context.Context, upstream, repository string) ([]string, error)

	// History is what a ref meant, newest first.
	History func(context.Context, audit.Ref, audit.HistoryQuery) ([]audit.Stint, error)

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
	Source   string // hit, join, fill, pass or stale
	Sent     bool   // the content was sent, not only described
	Err      error  // why it was refused or given up

	begun bool // a status was sent: an error can only abort
}

// A Handler is the registry: the /v2 API of every upstream.
type Handler struct{ o Options }

// New returns the handler that o describes.
func New(o Options) *Handler {
	if o.Observe == nil {
		o.Observe = func(*http.Request, Pull) {}
	}
	return &Handler{o}
}

// ServeHTTP answers a request of the /v2 API. It is the only place that looks
// at an error: nothing sent yet is an error for the client, something sent can
// only be cut off.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var p Pull
	p.Err = h.serve(w, r, &p)
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

func (h *Handler) serve(w http.ResponseWriter, r *http.Request, p *Pull) error {
	w.Header()["Docker-Distribution-Api-Version"] = apiVersion
	req, err := oci.Parse(r.Method, r.URL.Path)
	p.Kind = req.Kind
	if err != nil {
		return err
	}
	if req.Kind == oci.Ping {
		return ping(w, p)
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
	repo := repository{target, h.o.Upstreams[target.Upstream], h.o.Cache}
	p.Upstream, p.Repo, p.Tag, p.Digest = target.Upstream, target.Repository, req.Tag, req.Digest
	switch req.Kind {
	case oci.Manifest:
		return h.manifest(w, r, repo, req, p)
	case oci.Blob:
		return h.blob(w, r, repo, req, p)
	case oci.TagList:
		return h.tags(w, r, repo, p)
	case oci.TagHistory, oci.OCITagHistory:
		return h.tagHistory(w, r, repo, req, p)
	default:
		return &oci.Error{Status: http.StatusMethodNotAllowed, Code: oci.Unsupported, Message: "tidemark is a mirror and takes no pushes; push to " + target.Upstream + " itself"}
	}
}

// Header values that every answer of a kind shares.
var (
	apiVersion = []string{"registry/2.0"}
	immutable  = []string{"max-age=31536000, immutable"}
	rangeUnit  = []string{"bytes"}
	octets     = []string{"application/octet-stream"}
)

func ping(w http.ResponseWriter, p *Pull) error {
	w.Header().Set("Content-Type", "application/json")
	p.begun = true
	_, err := w.Write([]byte("{}"))
	return err
}

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
	var ans audit.Answer
	if req.Tag != "" {
		var err error
		ans, err = h.o.Ledger.Resolve(ctx, repo.ref(req.Tag), repo.ask(req.Tag))
		if err != nil {
			return err
		}
		dgst = ans.Served
		p.Digest = dgst
	} else if r.Method == http.MethodHead {
		if _, here := h.o.Cache.Stat(dgst); !here {
			return h.headManifest(w, r, repo, dgst, p)
		}
	}
	m, outcome, err := h.o.Cache.Manifest(ctx, dgst, repo.manifest(dgst))
	if err != nil {
		return err
	}
	if h.o.Prefetch && !m.Index && r.Method == http.MethodGet {
		h.o.Cache.Prefetch(m, func(ref cache.Reference) cache.Source { return repo.blob(ref.Digest) })
	}
	head := w.Header()
	describeContent(head, dgst, m.MediaType, int64(len(m.Body)))
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
	p.begun = true
	if notModified(w, r, dgst) || r.Method == http.MethodHead {
		return nil
	}
	p.Sent = true
	_, err = w.Write(m.Body)
	return err
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
	p.Source, p.begun = cache.Pass.String(), true
	notModified(w, r, dgst)
	return nil
}

func (h *Handler) blob(w http.ResponseWriter, r *http.Request, repo repository, req oci.Request, p *Pull) error {
	rng, err := parseRange(r)
	if err != nil {
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
	p.begun = true
	w.WriteHeader(status)
	_, err = section.WriteTo(w)
	p.Source = b.Outcome.String() // it may have changed half-way
	return err
}

// headBlob answers with the size of a blob, which upstream is asked for with a
// HEAD when it is not here.
func (h *Handler) headBlob(w http.ResponseWriter, r *http.Request, repo repository, dgst digest.Digest, p *Pull) error {
	size, here := h.o.Cache.Stat(dgst)
	p.Source = cache.Hit.String()
	w.Header()["Cache-Status"] = contentStatus(cache.Hit)
	if !here {
		var err error
		if size, err = repo.upstream.HeadBlob(r.Context(), repo.Repository, dgst); err != nil {
			return err
		}
		p.Source = cache.Pass.String()
		w.Header()["Cache-Status"] = asked
	}
	describeContent(w.Header(), dgst, octets[0], size)
	p.begun = true
	notModified(w, r, dgst)
	return nil
}

// tags answers with upstream's page of tags, or with those known here when
// upstream does not answer.
func (h *Handler) tags(w http.ResponseWriter, r *http.Request, repo repository, p *Pull) error {
	query := r.URL.Query()
	ns := query["ns"]
	query.Del("ns")
	if n := query.Get("n"); n != "" {
		if v, err := strconv.Atoi(n); err != nil || v < 0 {
			return &oci.Error{Status: http.StatusBadRequest, Code: oci.Unsupported, Message: "n is not a number of tags"}
		}
	}
	names, next, err := repo.upstream.Tags(r.Context(), repo.Repository, query)
	p.Source = cache.Pass.String()
	status := asked
	if err != nil {
		known, kerr := h.tagsWithout(r.Context(), repo, err)
		if kerr != nil {
			return kerr
		}
		names, next = page(known, query)
		status = staleStatus(err)
		p.Source = "stale"
	}
	if next != nil {
		if ns != nil {
			next["ns"] = ns
		}
		w.Header().Set("Link", "</v2/"+repo.Name+"/tags/list?"+next.Encode()+`>; rel="next"`)
	}
	if names == nil {
		names = []string{}
	}
	body, err := json.Marshal(struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{repo.Name, names})
	if err != nil {
		return err
	}
	head := w.Header()
	head.Set("Content-Type", "application/json")
	head.Set("Content-Length", strconv.Itoa(len(body)))
	head["Cache-Status"] = status
	p.begun = true
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(body)
	return err
}

// tagsWithout returns the tags known here if cause is that upstream did not
// answer, and cause otherwise.
func (h *Handler) tagsWithout(ctx context.Context, repo repository, cause error) ([]string, error) {
	if !silent(cause) {
		return nil, cause
	}
	known, err := h.o.KnownTags(ctx, repo.Upstream, repo.Repository)
	if err != nil || len(known) == 0 {
		return nil, cause // what matters to the client
	}
	return known, nil
}

// page cuts sorted tags as distribution-spec, "Listing Tags", has it.
func page(tags []string, query url.Values) ([]string, url.Values) {
	last := query.Get("last")
	for len(tags) > 0 && tags[0] <= last {
		tags = tags[1:]
	}
	n, err := strconv.Atoi(query.Get("n"))
	if err != nil || n >= len(tags) {
		return tags, nil
	}
	if n == 0 {
		return nil, nil
	}
	return tags[:n], url.Values{"n": {strconv.Itoa(n)}, "last": {tags[n-1]}}
}
