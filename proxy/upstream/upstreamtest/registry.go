// Package upstreamtest is an upstream to test against: a registry in memory
// whose tags move on command, whose faults have names, and which counts what it
// is asked for.
//
//	up := upstreamtest.New()
//	defer up.Close()
//	img := upstreamtest.NewImage("hello")
//	up.Push("library/app", "1", img)
//	up.Break(upstreamtest.Fault{Name: upstreamtest.Cut, Path: img.Layers[0].Digest.String(), At: 1000, Times: 1})
//	… pull …
//	up.Count("GET", "/blobs/")
package upstreamtest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Content is bytes with a name.
type Content struct {
	MediaType string
	Digest    digest.Digest
	Body      []byte
}

// NewContent names bytes by their sha256.
func NewContent(mediaType string, body []byte) Content {
	return Content{mediaType, digest.FromBytes(body), body}
}

// An Image is a manifest and what it refers to.
type Image struct {
	Manifest Content
	Config   Content
	Layers   []Content
}

// NewImage returns an image of the given layers, the same for the same layers.
func NewImage(layers ...string) Image {
	return imageFor(ocispec.Platform{Architecture: "amd64", OS: "linux"}, layers)
}

func imageFor(p ocispec.Platform, layers []string) Image {
	var img Image
	cfg := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	m.SchemaVersion = 2
	for _, l := range layers {
		c := NewContent(ocispec.MediaTypeImageLayer, []byte(l))
		img.Layers = append(img.Layers, c)
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, c.Digest)
		m.Layers = append(m.Layers, descriptor(c))
	}
	img.Config = NewContent(ocispec.MediaTypeImageConfig, encode(cfg))
	m.Config = descriptor(img.Config)
	img.Manifest = NewContent(ocispec.MediaTypeImageManifest, encode(m))
	return img
}

// An Index is a manifest for several platforms.
type Index struct {
	Manifest Content
	Images   []Image
}

// NewIndex returns an index of an amd64 and an arm64 image of these layers.
func NewIndex(layers ...string) Index {
	var idx Index
	m := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	m.SchemaVersion = 2
	for _, arch := range []string{"amd64", "arm64"} {
		p := ocispec.Platform{Architecture: arch, OS: "linux"}
		img := imageFor(p, layers)
		d := descriptor(img.Manifest)
		d.Platform = &p
		m.Manifests = append(m.Manifests, d)
		idx.Images = append(idx.Images, img)
	}
	idx.Manifest = NewContent(ocispec.MediaTypeImageIndex, encode(m))
	return idx
}

func descriptor(c Content) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: c.MediaType, Digest: c.Digest, Size: int64(len(c.Body))}
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("upstreamtest: " + err.Error())
	}
	return b
}

// A Request is one that the registry was asked.
type Request struct {
	Method, Path, Host, Range, Accept, Authorization string
	Status                                           int
	Sent                                             int64 // bytes of the body
}

// A Registry is the upstream. Its methods may be called at any time.
type Registry struct {
	srv *httptest.Server
	cdn *httptest.Server // where redirected blobs are; by another host name

	mu       sync.Mutex
	manifest map[string]Content // "repo@digest" and "repo:tag"
	variant  map[string]Content // "repo:tag": for clients that take no index
	blobs    map[digest.Digest][]byte
	faults   []*Fault
	requests []*Request
	user     string // "" is anonymous
	password string
	basic    bool
	bearer   bool
	tokens   int
	tokenFor time.Duration // validity of tokens
	released chan struct{} // closed when stalled and hanging requests may go on

	readers   map[string][]string             // of a private repository: the Authorizations that may read it
	only      map[digest.Digest][]string      // the repositories of a blob that not all have
	referrers map[string][]ocispec.Descriptor // "repo@subject"; nil is a registry without lists
	hides     bool                            // private repositories are 404 to strangers
}

// New starts a registry without content on loopback.
func New() *Registry {
	r := &Registry{
		manifest: make(map[string]Content), variant: make(map[string]Content), blobs: make(map[digest.Digest][]byte),
		tokenFor: time.Minute, released: make(chan struct{}),
		readers: make(map[string][]string), only: make(map[digest.Digest][]string),
	}
	r.srv = httptest.NewServer(r)
	r.cdn = httptest.NewServer(r)
	return r
}

// URL is the registry's address.
func (r *Registry) URL() *url.URL {
	u, err := url.Parse(r.srv.URL)
	if err != nil {
		panic("upstreamtest: " + err.Error())
	}
	return u
}

// Close stops the registry; what hangs is let go.
func (r *Registry) Close() {
	r.Release()
	r.srv.CloseClientConnections()
	r.cdn.CloseClientConnections()
	r.srv.Close()
	r.cdn.Close()
}

// Push makes tag mean img in repo.
func (r *Registry) Push(repo, tag string, img Image) {
	r.PushManifest(repo, tag, img.Manifest)
	r.PushBlobs(append(slices.Clone(img.Layers), img.Config)...)
}

// PushIndex makes tag mean idx in repo.
func (r *Registry) PushIndex(repo, tag string, idx Index) {
	for _, img := range idx.Images {
		r.Push(repo, img.Manifest.Digest.String(), img)
	}
	r.PushManifest(repo, tag, idx.Manifest)
}

// PushVariant has clients that do not accept an index get m by tag, as
// registries do that choose a platform for them.
func (r *Registry) PushVariant(repo, tag string, m Content) {
	r.PushManifest(repo, m.Digest.String(), m)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.variant[repo+":"+tag] = m
}

// PushManifest makes reference, a tag or a digest, mean m in repo.
func (r *Registry) PushManifest(repo, reference string, m Content) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifest[repo+"@"+m.Digest.String()] = m
	if _, err := digest.Parse(reference); err != nil {
		r.manifest[repo+":"+reference] = m
	}
}

// PushBlobs makes content available in every repository.
func (r *Registry) PushBlobs(cs ...Content) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range cs {
		r.blobs[c.Digest] = c.Body
	}
}

// PushPrivate makes tag mean img in repo, which only those may read who send one
// of these Authorizations. No other repository has its blobs.
func (r *Registry) PushPrivate(repo, tag string, img Image, authorizations ...string) {
	r.Push(repo, tag, img)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.readers[repo] = authorizations
	for _, c := range append(slices.Clone(img.Layers), img.Config) {
		r.only[c.Digest] = append(r.only[c.Digest], repo)
	}
}

// Hide has private repositories be 404 to those who may not read them.
func (r *Registry) Hide() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hides = true
}

// Refer puts a manifest into repo and on the list of what refers to subject. The
// registry has such lists from the first one on.
func (r *Registry) Refer(repo string, subject digest.Digest, artifactType string, m Content) {
	r.PushManifest(repo, m.Digest.String(), m)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.referrers == nil {
		r.referrers = make(map[string][]ocispec.Descriptor)
	}
	d := descriptor(m)
	d.ArtifactType = artifactType
	key := repo + "@" + subject.String()
	r.referrers[key] = append(r.referrers[key], d)
}

// NewReferrerIndex returns the index that the referrers tag schema wants of these
// manifests, by type.
func NewReferrerIndex(artifactType string, ms ...Content) Content {
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	idx.SchemaVersion = 2
	for _, m := range ms {
		d := descriptor(m)
		d.ArtifactType = artifactType
		idx.Manifests = append(idx.Manifests, d)
	}
	return NewContent(ocispec.MediaTypeImageIndex, encode(idx))
}

// Delete forgets a manifest by tag or digest.
func (r *Registry) Delete(repo, reference string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.manifest, repo+":"+reference)
	delete(r.manifest, repo+"@"+reference)
}

// RequireToken has the registry ask for bearer tokens, which its realm gives to
// user, or to anyone if user is "".
func (r *Registry) RequireToken(user, password string, valid time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bearer, r.user, r.password, r.tokenFor = true, user, password, valid
}

// RequireBasic has the registry ask for a password.
func (r *Registry) RequireBasic(user, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.basic, r.user, r.password = true, user, password
}

// Tokens is how many tokens were given out.
func (r *Registry) Tokens() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tokens
}

// Requests returns what was asked so far, tokens excepted.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Request, len(r.requests))
	for i, q := range r.requests {
		out[i] = *q
	}
	return out
}

// Count counts requests of a method, "" for any, whose path contains part.
func (r *Registry) Count(method, part string) int {
	n := 0
	for _, q := range r.Requests() {
		if (method == "" || q.Method == method) && strings.Contains(q.Path, part) {
			n++
		}
	}
	return n
}

// Sent is how many bytes of bodies were sent for paths that contain part.
func (r *Registry) Sent(part string) int64 {
	n := int64(0)
	for _, q := range r.Requests() {
		if strings.Contains(q.Path, part) {
			n += q.Sent
		}
	}
	return n
}

// Reset forgets the requests counted so far and all faults.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests, r.faults, r.tokens = nil, nil, 0
}

// ServeHTTP answers as the registry does at its own address, for tests that put
// something in front.
func (r *Registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if q.URL.Path == "/token" {
		r.token(w, q)
		return
	}
	rec := &Request{
		Method: q.Method, Path: q.URL.Path, Host: q.Host, Range: q.Header.Get("Range"),
		Accept: q.Header.Get("Accept"), Authorization: q.Header.Get("Authorization"),
	}
	r.mu.Lock()
	r.requests = append(r.requests, rec)
	r.mu.Unlock()
	fw := &faultyWriter{ResponseWriter: w, r: r, q: q, rec: rec, fault: r.faultFor(q)}
	if fw.fault != nil && fw.begin() {
		return
	}
	if status := r.private(q); status != 0 {
		if status == http.StatusUnauthorized {
			fw.Header().Set("WWW-Authenticate", r.challenge(q))
		}
		refuse(fw, status, "UNAUTHORIZED")
		return
	}
	if !r.authorized(q) {
		fw.Header().Set("WWW-Authenticate", r.challenge(q))
		refuse(fw, http.StatusUnauthorized, "UNAUTHORIZED")
		return
	}
	r.answer(fw, q)
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"said upstreamtest"}]}`, code)
}

func (r *Registry) authorized(q *http.Request) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case q.Host == hostOf(r.cdn.URL):
		return true // what redirects lead to is signed, not authenticated
	case r.basic:
		user, password, _ := q.BasicAuth()
		return user == r.user && password == r.password
	case r.bearer:
		var until int64
		_, err := fmt.Sscanf(q.Header.Get("Authorization"), "Bearer token-%d", &until)
		return err == nil && time.Now().UnixNano() < until
	}
	return true
}

// private is the status by which a private repository refuses: 401 to those who
// come without anything, 403 to others.
func (r *Registry) private(q *http.Request) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	readers, private := r.readers[repoOf(q.URL.Path)]
	sent := q.Header.Get("Authorization")
	switch {
	case !private, slices.Contains(readers, sent), q.Host == hostOf(r.cdn.URL):
		return 0
	case r.hides:
		return http.StatusNotFound
	case sent == "":
		return http.StatusUnauthorized
	}
	return http.StatusForbidden
}

func hostOf(u string) string { return strings.TrimPrefix(u, "http://") }

func (r *Registry) challenge(q *http.Request) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.basic {
		return `Basic realm="upstreamtest"`
	}
	return fmt.Sprintf(`Bearer realm="%s/token",service="upstreamtest",scope="repository:%s:pull"`, r.srv.URL, repoOf(q.URL.Path))
}

func (r *Registry) token(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if user, password, _ := q.BasicAuth(); r.user != "" && (user != r.user || password != r.password) {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return
	}
	r.tokens++
	fmt.Fprintf(w, `{"token":"token-%d","expires_in":%d}`, time.Now().Add(r.tokenFor).UnixNano(), int(r.tokenFor.Seconds()))
}

func repoOf(path string) string {
	path = strings.TrimPrefix(path, "/v2/")
	for _, part := range []string{"/manifests/", "/blobs/", "/tags/", "/referrers/"} {
		if i := strings.LastIndex(path, part); i >= 0 {
			return path[:i]
		}
	}
	return ""
}

func (r *Registry) answer(w *faultyWriter, q *http.Request) {
	repo := repoOf(q.URL.Path)
	ref := q.URL.Path[strings.LastIndexByte(q.URL.Path, '/')+1:]
	switch {
	case q.URL.Path == "/v2/":
		fmt.Fprint(w, "{}")
	case q.URL.Path == "/login":
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, "<html><body>Log in</body></html>")
	case strings.HasSuffix(q.URL.Path, "/tags/list"):
		r.listTags(w, q, repo)
	case strings.Contains(q.URL.Path, "/referrers/") && r.listReferrers(w, repo, ref):
	case strings.Contains(q.URL.Path, "/manifests/"):
		sep := ":"
		if strings.Contains(ref, ":") {
			sep = "@"
		}
		r.mu.Lock()
		m, ok := r.manifest[repo+sep+ref]
		if v, has := r.variant[repo+sep+ref]; has && !strings.Contains(q.Header.Get("Accept"), ocispec.MediaTypeImageIndex) {
			m = v
		}
		r.mu.Unlock()
		if !ok {
			refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
			return
		}
		w.Header().Set("Content-Type", m.MediaType)
		w.send(m.Digest, m.Body)
	case strings.Contains(q.URL.Path, "/blobs/"):
		r.mu.Lock()
		b, ok := r.blobs[digest.Digest(ref)]
		if in := r.only[digest.Digest(ref)]; in != nil {
			ok = ok && slices.Contains(in, repo)
		}
		r.mu.Unlock()
		if !ok {
			refuse(w, http.StatusNotFound, "BLOB_UNKNOWN")
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Accept-Ranges", "bytes")
		w.send(digest.Digest(ref), b)
	default:
		refuse(w, http.StatusNotFound, "UNSUPPORTED")
	}
}

// listReferrers answers with a list, unless the registry has none.
func (r *Registry) listReferrers(w http.ResponseWriter, repo, subject string) bool {
	r.mu.Lock()
	list, has := r.referrers[repo+"@"+subject], r.referrers != nil
	r.mu.Unlock()
	if !has {
		return false
	}
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: append([]ocispec.Descriptor{}, list...)}
	idx.SchemaVersion = 2
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	_, _ = w.Write(encode(idx)) // a client that is gone needs no error
	return true
}

func (r *Registry) listTags(w http.ResponseWriter, q *http.Request, repo string) {
	r.mu.Lock()
	var tags []string
	for k := range r.manifest {
		if tag, ok := strings.CutPrefix(k, repo+":"); ok {
			tags = append(tags, tag)
		}
	}
	r.mu.Unlock()
	if tags == nil {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN")
		return
	}
	slices.Sort(tags)
	if last := q.URL.Query().Get("last"); last != "" {
		tags = slices.DeleteFunc(tags, func(t string) bool { return t <= last })
	}
	if n, err := strconv.Atoi(q.URL.Query().Get("n")); err == nil && n < len(tags) {
		tags = tags[:n]
		w.Header().Set("Link", fmt.Sprintf(`</v2/%s/tags/list?n=%d&last=%s>; rel="next"`, repo, n, tags[n-1]))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	_ = json.NewEncoder(w).Encode(map[string]any{"name": repo, "tags": tags})
}
