package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/singleflight"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
)

// tags answers with upstream's page of tags, or with those known here when
// upstream does not answer.
func (h *Handler) tags(w http.ResponseWriter, r *http.Request, repo repository, p *Pull) error {
	if repo.view != nil {
		return h.pastTags(w, r, repo, p)
	}
	query := r.URL.Query()
	query.Del("ns")
	if _, err := pageSize(query); err != nil {
		return err
	}
	wait, cancel := repo.waiting(r.Context())
	names, next, err := repo.upstream.Tags(wait, repo.Repository, query)
	cancel()
	if err != nil {
		known, kerr := h.tagsWithout(r.Context(), repo, err)
		if kerr != nil {
			return kerr
		}
		p.Source = "stale"
		return h.sendTags(w, r, repo, p, known, staleStatus(err))
	}
	p.Source = cache.Pass.String()
	return h.sendTagPage(w, r, repo, p, names, next, asked)
}

// sendTags answers with the page that the client asks for of all tags.
func (h *Handler) sendTags(w http.ResponseWriter, r *http.Request, repo repository, p *Pull, all []string, status []string) error {
	names, next := page(all, r.URL.Query())
	return h.sendTagPage(w, r, repo, p, names, next, status)
}

func (h *Handler) sendTagPage(w http.ResponseWriter, r *http.Request, repo repository, p *Pull, names []string, next url.Values, status []string) error {
	if next != nil {
		if ns := r.URL.Query()["ns"]; ns != nil {
			next["ns"] = ns
		}
		w.Header().Set("Link", "<"+repo.path("tags/list")+"?"+next.Encode()+`>; rel="next"`)
	}
	w.Header()["Cache-Status"] = status
	return writeList(w, r, p, "application/json", struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{repo.Name, notNil(names)})
}

// tagsWithout returns the tags known here if cause is that upstream did not
// answer, and cause otherwise.
func (h *Handler) tagsWithout(ctx context.Context, repo repository, cause error) ([]string, error) {
	if !silent(cause) || !repo.mayList() {
		return nil, cause
	}
	known, err := h.o.KnownTags(ctx, repo.Upstream, repo.Repository)
	if err != nil || len(known) == 0 {
		return nil, cause // what matters to the client
	}
	return known, nil
}

// pageSize is the n of a list, -1 without one.
func pageSize(query url.Values) (int, error) {
	s := query.Get("n")
	if s == "" {
		return -1, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return 0, badQuery(fmt.Sprintf("n %.50q is not a number of entries", s))
	}
	return n, nil
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

// catalogMost bounds a page of the catalog.
const catalogMost = 1000

// catalog answers with the repositories that the ledger knows, under the names
// by which they can be pulled here. Upstreams are not asked: what they hold is
// not to be told, and would not fit.
func (h *Handler) catalog(w http.ResponseWriter, r *http.Request, p *Pull) error {
	query := r.URL.Query()
	n, err := pageSize(query)
	if err != nil {
		return err
	}
	if n < 0 || n > catalogMost {
		n = catalogMost
	}
	var among []string // of all upstreams
	if h.rights != nil {
		// Names are content too, and of one client's repositories others may not know.
		among = []string{}
		for name := range h.o.Upstreams {
			if h.o.Shared[name] {
				among = append(among, name)
			}
		}
	}
	names, err := h.o.Repositories(r.Context(), among, query.Get("last"), n+1)
	if err != nil {
		return err
	}
	if len(names) > n {
		names = names[:n]
		if n > 0 {
			next := url.Values{"n": {strconv.Itoa(n)}, "last": {names[n-1]}}
			if ns := query["ns"]; ns != nil {
				next["ns"] = ns
			}
			w.Header().Set("Link", "</v2/_catalog?"+next.Encode()+`>; rel="next"`)
		}
	}
	p.Source = cache.Hit.String()
	return writeList(w, r, p, "application/json", struct {
		Repositories []string `json:"repositories"`
	}{notNil(names)})
}

func notNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// writeList answers with JSON.
func writeList(w http.ResponseWriter, r *http.Request, p *Pull, mediaType string, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	head := w.Header()
	head.Set("Content-Type", mediaType)
	head.Set("Content-Length", strconv.Itoa(len(body)))
	if err := p.begin(); err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(body)
	return err
}

// A referrerList is what an upstream said refers to a manifest. The list itself is
// in the cache: it is small, and evicted with what is not used.
type referrerList struct {
	list  digest.Digest
	asked time.Time
}

// referrerLists remember where the answers are. Forgetting one costs a question.
type referrerLists struct {
	flights singleflight.Group // one question for each caller and subject

	mu    sync.Mutex
	known *simplelru.LRU[member, referrerList]
}

const referrersMost = 1 << 14

func (l *referrerLists) get(m member) (referrerList, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.known.Get(m)
}

func (l *referrerLists) put(m member, list digest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known.Add(m, referrerList{list, time.Now()})
}

// referrers answers with what refers to a manifest (distribution-spec, "Listing
// Referrers"): upstream's list or, where it has none, that of the tag schema. It
// is kept as long as an answer about a tag, and beyond while upstream is silent.
// The filter is applied here, whatever upstream can do.
func (h *Handler) referrers(w http.ResponseWriter, r *http.Request, repo repository, req oci.Request, p *Pull) error {
	// What refers to a manifest is for those who may have the manifest.
	if err := repo.mayRead(r.Context(), oci.Manifest, "", req.Digest); err != nil {
		return err
	}
	list, status, err := h.referrersOf(r.Context(), repo, req.Digest)
	if err != nil {
		return err
	}
	if want := r.URL.Query().Get("artifactType"); want != "" {
		list = slices.DeleteFunc(slices.Clone(list), func(d upstream.Referrer) bool { return d.ArtifactType != want })
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	p.Source = cache.Pass.String()
	w.Header()["Cache-Status"] = status
	return writeList(w, r, p, ocispec.MediaTypeImageIndex, indexOf(list))
}

type referrerIndex struct {
	SchemaVersion int                 `json:"schemaVersion"`
	MediaType     string              `json:"mediaType"`
	Manifests     []upstream.Referrer `json:"manifests"`
}

func indexOf(list []upstream.Referrer) referrerIndex {
	if list == nil {
		list = []upstream.Referrer{}
	}
	return referrerIndex{2, ocispec.MediaTypeImageIndex, list}
}

// referrersOf finds the list, and tells in the words of Cache-Status where. The
// caller may have the subject. Upstream is asked once for all who wait.
func (h *Handler) referrersOf(ctx context.Context, repo repository, subject digest.Digest) ([]upstream.Referrer, []string, error) {
	key := member{repo.Upstream, repo.Repository, subject}
	kept, known := h.lists.get(key)
	if known && h.o.TTL > 0 && time.Since(kept.asked) < h.o.TTL {
		if list, err := h.keptReferrers(ctx, kept); err == nil {
			return list, contentStatus(cache.Hit), nil
		}
	}
	wait, cancel := repo.waiting(ctx)
	defer cancel()
	result := h.lists.flights.DoChan(repo.upstream.Caller()+" "+repo.Upstream+" "+repo.Repository+" "+subject.String(), func() (any, error) {
		wait := context.WithoutCancel(ctx) // bounded by the upstream's own time-outs
		list, err := repo.upstream.Referrers(wait, repo.Repository, subject)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, upstream.ErrOffline) {
			list, err = h.referrersByTag(wait, repo, subject)
		}
		if err == nil && !repo.upstream.IsOffline() {
			h.keepReferrers(wait, key, list)
		}
		return list, err
	})
	list, err := await(wait, result)
	if err == nil {
		return list.([]upstream.Referrer), asked, nil
	}
	if known && silent(err) {
		if list, kerr := h.keptReferrers(ctx, kept); kerr == nil {
			return list, staleStatus(err), nil
		}
	}
	if silent(err) {
		if list, here := h.referrersHere(ctx, repo, subject); here {
			return list, staleStatus(err), nil
		}
	}
	return nil, nil, err
}

// referrersHere are the manifests that are here and refer to one that is, too.
func (h *Handler) referrersHere(ctx context.Context, repo repository, subject digest.Digest) (list []upstream.Referrer, here bool) {
	if _, here := h.o.Cache.Stat(subject); !here || !repo.proven(subject) {
		return nil, false
	}
	known, err := h.o.KnownReferrers(ctx, repo.Upstream, repo.Repository, subject)
	if err != nil {
		return nil, false // what matters to the client is that upstream is silent
	}
	for _, k := range known {
		var r upstream.Referrer
		if _, here := h.o.Cache.Stat(k.Digest); here && json.Unmarshal(k.Descriptor, &r) == nil {
			list = append(list, r)
		}
	}
	return list, true
}

// noteReferrer notes what a manifest that arrived refers to.
func (h *Handler) noteReferrer(repo repository, manifest []byte) {
	noteReferrer(h.o.NoteReferrers, repo, manifest)
}

// A NoteReferrers notes what refers to manifests of a repository.
type NoteReferrers func(upstream, repository string, list []audit.Referrer)

func noteReferrer(note NoteReferrers, repo repository, manifest []byte) {
	subject, listed, ok := oci.Referring(manifest)
	if !ok {
		return
	}
	if descriptor, err := json.Marshal(listed); err == nil {
		note(repo.Upstream, repo.Repository, []audit.Referrer{{Subject: subject, Digest: listed.Digest, Descriptor: descriptor}})
	}
}

// keepReferrers stores a list. One that cannot be is asked for again.
func (h *Handler) keepReferrers(ctx context.Context, key member, list []upstream.Referrer) {
	body, err := json.Marshal(indexOf(list))
	if err != nil || len(body) > oci.MaxManifest {
		return
	}
	dgst, err := keep(ctx, h.o.Cache, body)
	if err != nil {
		return
	}
	before, _ := h.lists.get(key)
	h.lists.put(key, dgst)
	if before.list == dgst || len(body) > notedMost {
		return
	}
	var noted []audit.Referrer
	for _, r := range list {
		if d, err := oci.ParseDigest(r.Digest); err == nil {
			noted = append(noted, audit.Referrer{Subject: key.digest, Digest: d, Descriptor: r.Descriptor})
		}
	}
	if len(noted) > 0 {
		h.o.NoteReferrers(key.upstream, key.repository, noted)
	}
}

// notedMost bounds in bytes the list of what refers to one manifest that is noted for
// when upstream is silent after a restart.
const notedMost = 256 << 10

func (h *Handler) keptReferrers(ctx context.Context, kept referrerList) ([]upstream.Referrer, error) {
	body, err := h.o.Cache.Read(ctx, kept.list, nil, oci.MaxManifest)
	if err != nil {
		return nil, err
	}
	var index referrerIndex
	err = json.Unmarshal(body, &index)
	return index.Manifests, err
}

// referrersByTag reads the list that clients keep under a tag where the registry
// keeps none (distribution-spec, "Referrers Tag Schema"). It is a tag like any
// other: what it means is in the ledger. Without the tag there are none.
func (h *Handler) referrersByTag(ctx context.Context, repo repository, subject digest.Digest) ([]upstream.Referrer, error) {
	m, _, _, err := h.resolved(ctx, repo, oci.ReferrersTag(subject))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return taggedReferrers(m), nil
}

// taggedReferrers reads such a list.
func taggedReferrers(m *cache.Manifest) []upstream.Referrer {
	var index referrerIndex
	if !m.Index || json.Unmarshal(m.Body, &index) != nil {
		return nil // somebody's tag that only looks like one
	}
	return index.Manifests
}
