// Package upstream is a registry as a well-mannered client sees it: tokens,
// retries, limits and quirks are handled here, and nothing above knows of them.
package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/proxy/oci"
)

// Options configure an Upstream. Name and Endpoints are required; the zero
// value of everything else is a sensible default.
type Options struct {
	Name        string      // as the configuration and the ledger call it, such as docker.io
	Endpoints   []*url.URL  // tried in order
	Credentials Credentials // nil is anonymous
	Identity    string      // what the ledger calls whose credentials these are; never a secret
	TokenRealms []string    // hosts that may issue tokens, besides the upstream's own domain
	RootCAs     *x509.CertPool
	Insecure    bool // do not verify certificates
	UserAgent   string
	Offline     bool // ask nobody: every request fails at once with ErrOffline

	// ConnectTimeout bounds name resolution, connection and TLS handshake each
	// (default 3 s), HeaderTimeout the wait for the head of an answer, with tokens,
	// redirects and all endpoints (8 s),
	// IdleTimeout the wait for the next byte of a body (30 s). A dead upstream
	// must cost a client seconds: containerd gives up on a mirror after 30.
	ConnectTimeout, HeaderTimeout, IdleTimeout time.Duration

	// Observe, if set, is told the status of every response, or 0 for none.
	Observe func(status int)
}

// An Upstream is one configured registry, asked with the credentials of the
// configuration or, as As makes it, with those of one client. It is safe for
// concurrent use, and owns nothing that outlives its requests but idle connections.
type Upstream struct {
	*registry
	client *http.Client
	caller string // a keyed hash of the client's credentials, "" for the configuration's
}

// A registry is what all who ask an upstream share.
type registry struct {
	name      string
	endpoints []*endpoint
	userAgent string
	identity  string
	offline   bool
	observe   func(int)
	auth      *authTransport
	redirect  func(*http.Request, []*http.Request) error
	callers   callers
	timeout   time.Duration     // until the head of an answer
	pushing   http.RoundTripper // to the endpoints, with time for them to store what was sent

	missing missing // what upstream lately said it does not have

	remaining atomic.Int64 // last ratelimit-remaining plus one; 0 when never told
	limit     atomic.Int64 // last ratelimit-limit; 0 when never told
	clock     atomic.Int64 // by how much upstream's clock was ahead at its last answer, in ns; 0 when never told

	mu        sync.Mutex
	lastError string // of the last request that got no usable answer, "" after a good one
	limited   bool   // that was a rate limit of the configuration's own
}

// An endpoint is one address of an upstream, with the breaker that keeps a
// broken one from being asked by everybody.
type endpoint struct {
	url     *url.URL
	breaker breaker
}

// New returns the upstream that o describes. It dials nothing.
func New(o Options) *Upstream {
	r := &registry{
		name:      o.Name,
		userAgent: o.UserAgent,
		identity:  o.Identity,
		offline:   o.Offline,
		observe:   o.Observe,
		callers:   newCallers(),
		timeout:   orDefault(o.HeaderTimeout, headerTimeout),
	}
	if r.observe == nil {
		r.observe = func(int) {}
	}
	if r.identity == "" {
		r.identity = "anonymous"
	}
	r.missing.init()
	for _, e := range o.Endpoints {
		r.endpoints = append(r.endpoints, &endpoint{url: e})
	}
	tlsConfig := &tls.Config{RootCAs: o.RootCAs, InsecureSkipVerify: o.Insecure, MinVersion: tls.VersionTLS12}
	dial := &dialer{timeout: orDefault(o.ConnectTimeout, connectTimeout)}
	idle := orDefault(o.IdleTimeout, idleTimeout)
	own := idleTransport{newTransport(dial.own, tlsConfig, o, 0), idle}
	foreign := idleTransport{newTransport(dial.foreign, tlsConfig, o, 0), idle}
	r.pushing = idleTransport{newTransport(dial.own, tlsConfig, o, pushTimeout), idle}
	r.auth = &authTransport{
		own: own, foreign: foreign,
		endpoints: o.Endpoints, realms: o.TokenRealms, keys: keyring{ask: o.Credentials},
		basic: make(map[string]bool), tokens: make(map[audience]token), refused: make(map[audience]refusal), wrong: make(map[login]time.Time), good: make(map[login]bool),
	}
	r.redirect = dial.checkRedirect
	return &Upstream{registry: r, client: &http.Client{Transport: r.auth, CheckRedirect: r.redirect}}
}

// The times that a dead upstream may cost. A pull is answered or refused within
// ten seconds, whatever becomes of the questions that it asks.
const (
	connectTimeout = 3 * time.Second
	headerTimeout  = 8 * time.Second
	idleTimeout    = 30 * time.Second
	pushTimeout    = 5 * time.Minute // until what was pushed is stored and acknowledged
)

func orDefault(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}

// Name is what the configuration calls this upstream.
func (u *Upstream) Name() string { return u.name }

// Identity says as whom the upstream is asked, without saying who that is:
// "anonymous", what the configuration's credentials are called, or "client".
func (u *Upstream) Identity() string {
	if u.caller != "" {
		return "client"
	}
	return u.identity
}

// IdentityOf is what the ledger calls a user: a short hash of the name.
func IdentityOf(username string) string {
	return "user-" + digest.FromString(username).Encoded()[:8]
}

// Endpoint is the address that is asked first.
func (u *Upstream) Endpoint() *url.URL { return u.endpoints[0].url }

// IsOffline tells that nobody is ever asked.
func (u *Upstream) IsOffline() bool { return u.offline }

// A Health is what the last requests said about an upstream.
type Health struct {
	ClockAhead         time.Duration // upstream's clock, in whole seconds as it tells the time
	Healthy            bool
	LastError          string
	RateLimitRemaining int64 // -1 when upstream does not tell
	RateLimit          int64 // what there is when nothing was used; 0 when upstream does not tell
}

// Health tells how the upstream is doing, without asking it.
func (u *Upstream) Health() Health {
	u.mu.Lock()
	defer u.mu.Unlock()
	return Health{time.Duration(u.clock.Load()), u.lastError == "", u.lastError, u.remaining.Load() - 1, u.limit.Load()}
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
	size, _, err := u.StatBlob(ctx, repository, dgst)
	return size, err
}

// StatBlob is HeadBlob, and tells whether the answer names the digest. Where upstream
// redirects to a store of objects, that does not.
func (u *Upstream) StatBlob(ctx context.Context, repository string, dgst digest.Digest) (size int64, named bool, err error) {
	resp, err := u.do(ctx, http.MethodHead, blobPath(repository, dgst), nil)
	if err != nil {
		return 0, false, err
	}
	resp.Body.Close()
	named, err = u.named(resp, dgst)
	return resp.ContentLength, named, err
}

// named tells whether an answer about content names its digest. One that names
// another, or is a page for people, is no answer about it.
func (u *Upstream) named(resp *http.Response, dgst digest.Digest) (bool, error) {
	claim := resp.Header.Get("Docker-Content-Digest")
	if claim != "" && claim != dgst.String() {
		return false, u.nonsense(resp.Request, fmt.Errorf("asked for %s, its Docker-Content-Digest is %.100q", dgst, claim))
	}
	if t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); claim == "" && err == nil && t == "text/html" {
		return false, u.nonsense(resp.Request, errors.New("it is a page for people"))
	}
	return claim != "", nil
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

func (u *Upstream) readAll(resp *http.Response, path string, limit int64) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, &Error{Upstream: u.name, Op: "GET " + path, Caller: u.caller, Err: err}
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
		return nil, &Error{Upstream: u.name, Op: op, Caller: u.caller, Err: ErrOffline}
	}
	if u.missing.has(u.caller + path) {
		return nil, &Error{Upstream: u.name, Op: op, Status: http.StatusNotFound, Remembered: true, Caller: u.caller, Message: "upstream said so moments ago"}
	}
	var err error
	began := time.Now()
	for i, e := range u.endpoints {
		refusal, probe := e.breaker.refuses()
		if refusal != nil && !u.isOthersLimit(refusal) {
			refusal.Op, refusal.Caller = op, u.caller
			err = refusal
			continue
		}
		// One that hangs leaves time for those after it.
		patience := (u.timeout - time.Since(began)) / time.Duration(len(u.endpoints)-i)
		var resp *http.Response
		resp, err = u.askWithin(ctx, patience, probe, e, method, path, header)
		if err == nil {
			u.answered(nil)
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
			u.missing.add(u.caller + path)
			u.answered(nil)
		case ctx.Err() == nil && ue.worthAnotherEndpoint() && !u.isOthersLimit(ue):
			u.answered(ue)
		}
	}
	return nil, err
}

// answered keeps how the last request ended. What clients are answered with their
// own rights says nothing about a limit that is ours.
func (u *Upstream) answered(e *Error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.caller != "" && u.limited {
		return
	}
	u.lastError, u.limited = "", false
	if e != nil {
		u.lastError, u.limited = e.Error(), e.Status == http.StatusTooManyRequests
	}
}

// silence is the cause of a question that got no answer for so long.
type silence time.Duration

func (s silence) Error() string {
	return fmt.Sprintf("upstream did not answer within %v", time.Duration(s).Round(time.Millisecond))
}

// silent tells the end of a context by silence from a caller who has left.
func silent(ctx context.Context) (silence, bool) {
	s, ok := context.Cause(ctx).(silence)
	return s, ok
}

// askWithin is ask, which gets patience for the head of the answer.
func (u *Upstream) askWithin(ctx context.Context, patience time.Duration, probe probe, e *endpoint, method, path string, header http.Header) (*http.Response, error) {
	actx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(patience, func() { cancel(silence(patience)) })
	resp, err := u.ask(actx, probe, e, method, path, header)
	if err != nil || !late.Stop() {
		if err == nil {
			resp.Body.Close()
			err = &Error{Upstream: u.name, Op: method + " " + path, Err: silence(patience), Caller: u.caller}
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = &endingBody{resp.Body, cancel}
	return resp, nil
}

// An endingBody ends the context of its request when it is closed.
type endingBody struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

func (b *endingBody) Close() error {
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}

// ask sends one request to one endpoint, and tells its breaker how it went.
func (u *Upstream) ask(ctx context.Context, probe probe, e *endpoint, method, path string, header http.Header) (*http.Response, error) {
	op := method + " " + path
	var connected, wrote atomic.Bool // set by the transport's own goroutines
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected.Store(true) }, WroteHeaders: func() { wrote.Store(true) }}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(ctx, trace), method, strings.TrimSuffix(e.url.String(), "/")+path, nil)
	if err != nil {
		ue := &Error{Upstream: u.name, Op: op, Caller: u.caller, Err: err}
		e.breaker.done(probe, true, ue, u.caller != "")
		return nil, ue
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", u.userAgent)
	resp, err := u.client.Do(req)
	if err != nil {
		if s, ok := silent(ctx); ok {
			err = s
		}
		ue := &Error{Upstream: u.name, Op: op, Err: unwrapURL(err)}
		var refused *Error // by the transport's own rules, or by a token realm
		if errors.As(ue.Err, &refused) {
			told := *refused // others who wait for the same token have it too
			told.Upstream, told.Op = u.name, op
			ue = &told
		} else {
			u.observe(0)
		}
		ue.Caller = u.caller
		// What could not even be sent, and what was known before, says nothing of it.
		unasked := ue.Remembered || ue.Ours || connected.Load() && !wrote.Load()
		e.breaker.done(probe, unasked || hasLeft(ctx), ue, u.caller != "")
		return nil, ue
	}
	u.observe(resp.StatusCode)
	if t, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		u.clock.Store(int64(time.Until(t)))
	}
	if n, ok := rateLimit(resp.Header, "Ratelimit-Remaining"); ok && u.caller == "" {
		u.remaining.Store(n + 1)
		n, _ = rateLimit(resp.Header, "Ratelimit-Limit")
		u.limit.Store(n)
	}
	if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent {
		e.breaker.done(probe, false, nil, u.caller != "")
		return resp, nil
	}
	defer resp.Body.Close()
	ue := u.refusal(resp, op)
	e.breaker.done(probe, hasLeft(ctx), ue, u.caller != "")
	return nil, ue
}

// rateLimit reads a number such as 100;w=21600, as the Hub tells its limits.
func rateLimit(h http.Header, key string) (n int64, ok bool) {
	text, _, _ := strings.Cut(h.Get(key), ";")
	n, err := strconv.ParseInt(text, 10, 64)
	return max(0, n), err == nil && n >= 0
}

// hasLeft tells whether whoever asked does not wait any more, of his own accord.
func hasLeft(ctx context.Context) bool {
	_, silent := silent(ctx)
	return ctx.Err() != nil && !silent
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
