// Package upstream is a registry as a well-mannered client sees it: tokens,
// retries, limits and quirks are handled here, and nothing above knows of them.
package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"

	"tidemark/proxy/oci"
)

// Options configure an Upstream. Name and Endpoints are required; the zero
// value of everything else is a sensible default.
type Options struct {
	Name        string     // as the configuration and the ledger call it, such as docker.io
	Endpoints   []*url.URL // tried in order
	Username    string     // "" is anonymous
	Password    string
	TokenRealms []string // hosts that may issue tokens, besides the upstream's own domain
	RootCAs     *x509.CertPool
	Insecure    bool // do not verify certificates
	UserAgent   string
	Offline     bool // ask nobody: every request fails at once with ErrOffline

	// ConnectTimeout bounds name resolution, connection and TLS handshake each
	// (default 5 s), HeaderTimeout the wait for the head of a response (10 s),
	// IdleTimeout the wait for the next byte of a body (30 s). A dead upstream
	// must cost a client seconds: containerd gives up on a mirror after 30.
	ConnectTimeout, HeaderTimeout, IdleTimeout time.Duration

	// Observe, if set, is told the status of every response, or 0 for none.
	Observe func(status int)
}

// An Upstream is one configured registry. It is safe for concurrent use, and
// owns nothing that outlives its requests but idle connections.
type Upstream struct {
	name      string
	endpoints []*endpoint
	userAgent string
	identity  string
	offline   bool
	observe   func(int)
	client    *http.Client

	missing missing // what upstream lately said it does not have

	remaining atomic.Int64 // last ratelimit-remaining plus one; 0 when never told

	mu        sync.Mutex
	lastError string // of the last request that got no usable answer, "" after a good one
}

// An endpoint is one address of an upstream, with the breaker that keeps a
// broken one from being asked by everybody.
type endpoint struct {
	url     *url.URL
	breaker breaker
}

// New returns the upstream that o describes. It dials nothing.
func New(o Options) *Upstream {
	u := &Upstream{
		name:      o.Name,
		userAgent: o.UserAgent,
		identity:  identity(o.Username),
		offline:   o.Offline,
		observe:   o.Observe,
	}
	if u.observe == nil {
		u.observe = func(int) {}
	}
	u.missing.init()
	for _, e := range o.Endpoints {
		u.endpoints = append(u.endpoints, &endpoint{url: e})
	}
	tlsConfig := &tls.Config{RootCAs: o.RootCAs, InsecureSkipVerify: o.Insecure, MinVersion: tls.VersionTLS12}
	dial := &dialer{timeout: orDefault(o.ConnectTimeout, 5*time.Second)}
	idle := orDefault(o.IdleTimeout, 30*time.Second)
	own := idleTransport{newTransport(dial.own, tlsConfig, o), idle}
	foreign := idleTransport{newTransport(dial.foreign, tlsConfig, o), idle}
	auth := &authTransport{
		own: own, foreign: foreign,
		endpoints: o.Endpoints, realms: o.TokenRealms,
		username: o.Username, password: o.Password,
		basic: make(map[string]bool), tokens: make(map[audience]token),
	}
	u.client = &http.Client{Transport: auth, CheckRedirect: dial.checkRedirect}
	return u
}

func orDefault(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}

// Name is what the configuration calls this upstream.
func (u *Upstream) Name() string { return u.name }

// Identity says as whom the upstream is asked, without saying who that is:
// "anonymous", or a short hash of the user's name.
func (u *Upstream) Identity() string { return u.identity }

func identity(username string) string {
	if username == "" {
		return "anonymous"
	}
	return "user-" + digest.FromString(username).Encoded()[:8]
}

// A Health is what the last requests said about an upstream.
type Health struct {
	Healthy            bool
	LastError          string
	RateLimitRemaining int64 // -1 when upstream does not tell
}

// Health tells how the upstream is doing, without asking it.
func (u *Upstream) Health() Health {
	u.mu.Lock()
	defer u.mu.Unlock()
	return Health{u.lastError == "", u.lastError, u.remaining.Load() - 1}
}

// A Manifest is a manifest as upstream sent it, or, after a HEAD, what upstream
// claims about it: then Body is nil and Digest may be "".
type Manifest struct {
	Digest    digest.Digest // as claimed in Docker-Content-Digest, "" if it was not
	MediaType string
	Size      int64 // -1 when not told
	Body      []byte
	Edge      string // which of upstream's machines answered, "" if it does not say
}

// HeadManifest asks what reference, a tag or a digest, means in repository.
func (u *Upstream) HeadManifest(ctx context.Context, repository, reference string) (Manifest, error) {
	resp, err := u.do(ctx, http.MethodHead, "/v2/"+repository+"/manifests/"+reference, http.Header{"Accept": {oci.Accept}})
	if err != nil {
		return Manifest{}, err
	}
	resp.Body.Close()
	return u.manifest(resp)
}

// GetManifest downloads the manifest of reference, up to oci.MaxManifest bytes.
// Whether its bytes hash to the digest is for the caller to check.
func (u *Upstream) GetManifest(ctx context.Context, repository, reference string) (Manifest, error) {
	path := "/v2/" + repository + "/manifests/" + reference
	resp, err := u.do(ctx, http.MethodGet, path, http.Header{"Accept": {oci.Accept}})
	if err != nil {
		return Manifest{}, err
	}
	defer resp.Body.Close()
	m, err := u.manifest(resp)
	if err != nil {
		return Manifest{}, err
	}
	m.Body, err = u.readAll(resp, path, oci.MaxManifest)
	m.Size = int64(len(m.Body))
	return m, err
}

// manifest reads the claims of a response's head. A digest that is none is an
// upstream that cannot be believed.
func (u *Upstream) manifest(resp *http.Response) (Manifest, error) {
	m := Manifest{MediaType: resp.Header.Get("Content-Type"), Size: resp.ContentLength, Edge: edge(resp.Header)}
	if claim := resp.Header.Get("Docker-Content-Digest"); claim != "" {
		d, err := oci.ParseDigest(claim)
		if err != nil {
			return Manifest{}, u.nonsense(resp.Request, fmt.Errorf("Docker-Content-Digest %.100q is not a digest", claim))
		}
		m.Digest = d
	}
	return m, nil
}

// edge is what a response says about the machine it comes from, shortened.
func edge(h http.Header) string {
	for _, k := range []string{"X-Served-By", "Cf-Ray", "X-Amz-Cf-Pop", "Via"} {
		if v := h.Get(k); v != "" {
			if _, pop, ok := strings.Cut(v, "-"); k == "Cf-Ray" && ok {
				v = pop // the part before names the request
			}
			return v[:min(len(v), 64)]
		}
	}
	return ""
}

// Ping asks whether the registry and our credentials work at all.
func (u *Upstream) Ping(ctx context.Context) error {
	resp, err := u.do(ctx, http.MethodGet, "/v2/", nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// A Blob is a download that has begun.
type Blob struct {
	Body   io.ReadCloser
	Offset int64 // where Body begins in the blob: what was asked for, or 0 if upstream ignores ranges
	Size   int64 // of the whole blob, -1 when not told
}

// HeadBlob asks for the size of a blob, -1 if upstream does not tell.
func (u *Upstream) HeadBlob(ctx context.Context, repository string, dgst digest.Digest) (int64, error) {
	resp, err := u.do(ctx, http.MethodHead, blobPath(repository, dgst), nil)
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.ContentLength, nil
}

// GetBlob opens a blob from byte off on, up to n bytes or, when n is -1, to its
// end. Reading the body fails when upstream falls silent for too long.
func (u *Upstream) GetBlob(ctx context.Context, repository string, dgst digest.Digest, off, n int64) (*Blob, error) {
	h := http.Header{}
	switch {
	case n >= 0:
		h.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	case off > 0:
		h.Set("Range", fmt.Sprintf("bytes=%d-", off))
	}
	resp, err := u.do(ctx, http.MethodGet, blobPath(repository, dgst), h)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusPartialContent {
		return &Blob{resp.Body, 0, resp.ContentLength}, nil
	}
	start, size, ok := parseContentRange(resp.Header.Get("Content-Range"))
	if !ok || start != off {
		resp.Body.Close()
		return nil, u.nonsense(resp.Request, fmt.Errorf("asked for bytes from %d, got Content-Range %.100q", off, resp.Header.Get("Content-Range")))
	}
	return &Blob{resp.Body, start, size}, nil
}

func blobPath(repository string, dgst digest.Digest) string {
	return "/v2/" + repository + "/blobs/" + dgst.String()
}

// parseContentRange reads "bytes 5-9/10" (RFC 9110, section 14.4).
func parseContentRange(s string) (start, size int64, ok bool) {
	s, ok = strings.CutPrefix(s, "bytes ")
	if !ok {
		return 0, 0, false
	}
	span, total, ok := strings.Cut(s, "/")
	if !ok {
		return 0, 0, false
	}
	first, _, ok := strings.Cut(span, "-")
	if !ok {
		return 0, 0, false
	}
	start, err := strconv.ParseInt(first, 10, 64)
	if err != nil || start < 0 {
		return 0, 0, false
	}
	if total == "*" {
		return start, -1, true
	}
	size, err = strconv.ParseInt(total, 10, 64)
	return start, size, err == nil && size > start
}

// maxTagList bounds one page of tags in bytes. The Hub's longest repositories
// answer with about 1 MiB when asked for everything at once.
const maxTagList = 16 << 20

// Tags returns one page of a repository's tags as upstream pages them, and the
// query of the next page, "" at the end.
func (u *Upstream) Tags(ctx context.Context, repository string, query url.Values) (tags []string, next url.Values, err error) {
	path := "/v2/" + repository + "/tags/list"
	if q := query.Encode(); q != "" {
		path += "?" + q
	}
	resp, err := u.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := u.readAll(resp, path, maxTagList)
	if err != nil {
		return nil, nil, err
	}
	var list struct {
		Tags []string `json:"tags"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, nil, u.nonsense(resp.Request, fmt.Errorf("tag list: %w", err))
	}
	if link, ok := nextLink(resp.Header.Get("Link")); ok {
		next = link.Query()
	}
	return list.Tags, next, nil
}

// nextLink finds the target of rel="next" (RFC 8288).
func nextLink(header string) (*url.URL, bool) {
	for link := range strings.SplitSeq(header, ",") {
		target, params, ok := strings.Cut(strings.TrimSpace(link), ">")
		if !ok || !strings.HasPrefix(target, "<") || !strings.Contains(strings.ReplaceAll(params, `"`, ""), "rel=next") {
			continue
		}
		if u, err := url.Parse(target[1:]); err == nil {
			return u, true
		}
	}
	return nil, false
}

func (u *Upstream) readAll(resp *http.Response, path string, limit int64) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, &Error{Upstream: u.name, Op: "GET " + path, Err: err}
	}
	if int64(len(body)) > limit {
		return nil, u.nonsense(resp.Request, fmt.Errorf("the answer is larger than %d bytes", limit))
	}
	return body, nil
}

// do asks the endpoints in order until one gives a usable answer: any but 429,
// a server error or silence. The body of what it returns is not read yet.
func (u *Upstream) do(ctx context.Context, method, path string, header http.Header) (*http.Response, error) {
	op := method + " " + path
	if u.offline {
		return nil, &Error{Upstream: u.name, Op: op, Err: ErrOffline}
	}
	if u.missing.has(path) {
		return nil, &Error{Upstream: u.name, Op: op, Status: http.StatusNotFound, Remembered: true, Message: "upstream said so moments ago"}
	}
	var err error
	for _, e := range u.endpoints {
		if refusal := e.breaker.refuses(); refusal != nil {
			refusal.Op = op
			err = refusal
			continue
		}
		var resp *http.Response
		resp, err = u.ask(ctx, e, method, path, header)
		if err == nil {
			u.answered("")
			return resp, nil
		}
		var ue *Error
		if ctx.Err() != nil || !errors.As(err, &ue) || !ue.worthAnotherEndpoint() {
			break
		}
	}
	var ue *Error
	if errors.As(err, &ue) {
		switch {
		case ue.Status == http.StatusNotFound:
			u.missing.add(path)
			u.answered("")
		case ctx.Err() == nil && ue.worthAnotherEndpoint():
			u.answered(ue.Error())
		}
	}
	return nil, err
}

func (u *Upstream) answered(lastError string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.lastError = lastError
}

// ask sends one request to one endpoint, and tells its breaker how it went.
func (u *Upstream) ask(ctx context.Context, e *endpoint, method, path string, header http.Header) (*http.Response, error) {
	op := method + " " + path
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(e.url.String(), "/")+path, nil)
	if err != nil {
		return nil, &Error{Upstream: u.name, Op: op, Err: err}
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", u.userAgent)
	resp, err := u.client.Do(req)
	if err != nil {
		ue := &Error{Upstream: u.name, Op: op, Err: unwrapURL(err)}
		var refused *Error // by the transport's own rules, or by a token realm
		if errors.As(ue.Err, &refused) {
			told := *refused // others who wait for the same token have it too
			told.Upstream, told.Op = u.name, op
			ue = &told
		} else {
			u.observe(0)
		}
		e.breaker.done(ctx, ue)
		return nil, ue
	}
	u.observe(resp.StatusCode)
	if n, _, _ := strings.Cut(resp.Header.Get("Ratelimit-Remaining"), ";"); n != "" {
		if n, err := strconv.ParseInt(n, 10, 64); err == nil && n >= 0 {
			u.remaining.Store(n + 1)
		}
	}
	if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent {
		e.breaker.done(ctx, nil)
		return resp, nil
	}
	defer resp.Body.Close()
	ue := u.refusal(resp, op)
	e.breaker.done(ctx, ue)
	return nil, ue
}

// unwrapURL takes off the *url.Error, whose text repeats what Op says and may
// carry the signed query of a redirect.
func unwrapURL(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	if strings.Contains(ue.Err.Error(), "Location header") { // and quotes it
		return &Error{Nonsense: true, Err: errors.New("a redirect without a valid address")}
	}
	return ue.Err
}

// missingFor is how long a 404 is believed: long enough to spare upstream a
// herd, short enough that push-then-pull works for people.
const missingFor = 3 * time.Second

// missing remembers paths that upstream answered with 404.
type missing struct {
	mu    sync.Mutex
	until *simplelru.LRU[string, time.Time]
}

func (m *missing) init() {
	lru, err := simplelru.NewLRU[string, time.Time](4096, nil)
	if err != nil {
		panic("upstream: " + err.Error()) // the size is not positive
	}
	m.until = lru
}

func (m *missing) has(path string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.until.Get(path)
	return ok && time.Now().Before(t)
}

// Forget has upstream asked again for a manifest that it lately did not have.
func (u *Upstream) Forget(repository, reference string) {
	u.missing.mu.Lock()
	defer u.missing.mu.Unlock()
	u.missing.until.Remove("/v2/" + repository + "/manifests/" + reference)
}

func (m *missing) add(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.until.Add(path, time.Now().Add(missingFor))
}
