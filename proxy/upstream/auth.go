package upstream

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/publicsuffix"
	"golang.org/x/sync/singleflight"
)

// An authTransport authenticates requests to an upstream's own endpoints, with
// nothing, Basic (RFC 7617) or a bearer token (RFC 6750, distribution's token
// authentication). Requests elsewhere, where redirects lead, are sent as they
// are. Nothing above it knows that tokens exist.
type authTransport struct {
	own, foreign http.RoundTripper
	endpoints    []*url.URL
	realms       []string
	keys         keyring

	flights singleflight.Group // one token request for each audience at a time

	mu      sync.Mutex
	basic   map[string]bool // endpoints, by host, that ask for Basic
	tokens  map[audience]token
	refused map[audience]refusal
	wrong   map[login]time.Time // until when a credential is taken for wrong
	good    map[login]bool      // credentials that were taken before
}

// A login is a credential where it was sent.
type login struct {
	host string // of an endpoint or a realm
	cred Credential
}

// An audience is what a token is good for: a scope at one endpoint.
type audience struct{ host, scope string }

type token struct {
	value string
	until time.Time
}

// A refusal is that we may not have something. It is believed for a while.
type refusal struct {
	err   *Error
	until time.Time
}

const (
	refusedFor          = 30 * time.Second // of credentials: trying wrong ones again and again locks accounts
	refusedAnonymousFor = 3 * time.Second  // somebody may just make it public
)

func (t *authTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	e := t.endpoint(req.URL)
	if e == nil {
		return t.foreign.RoundTrip(req)
	}
	path := strings.TrimPrefix(req.URL.Path, strings.TrimSuffix(e.Path, "/"))
	if strings.HasPrefix(path, quayAPI) {
		return t.own.RoundTrip(req) // it is no part of the registry, and what it says is not said of that
	}
	to := audience{e.Host, scopeOf(path)}
	if err := t.wasRefused(to); err != nil {
		return nil, err
	}
	first := req.Clone(req.Context())
	sent, err := t.authorize(first, to)
	if err != nil {
		return nil, err
	}
	resp, err := t.own.RoundTrip(first)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		t.taken(login{to.host, sent}, err)
		return resp, err
	}
	again, err := t.answer(req, resp, to, first.Header.Get("Authorization"), sent)
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	if !again {
		t.refuse(to, resp.StatusCode)
		return resp, nil
	}
	_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBody) // so that the connection is used again
	resp.Body.Close()
	second := req.Clone(req.Context())
	if sent, err = t.authorize(second, to); err != nil {
		return nil, err
	}
	resp, err = t.own.RoundTrip(second)
	switch {
	case err == nil && resp.StatusCode == http.StatusUnauthorized && sent != (Credential{}):
		t.takeForWrong(login{to.host, sent})
	default:
		t.taken(login{to.host, sent}, err)
	}
	if err == nil && (resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden) {
		t.refuse(to, resp.StatusCode)
	}
	return resp, err
}

// answer does what the challenge of a 401 asks for, and tells whether it is worth
// asking again. authorization was refused, which came from the credential sent.
func (t *authTransport) answer(req *http.Request, resp *http.Response, to audience, authorization string, sent Credential) (bool, error) {
	bearer, basic := parseChallenges(resp.Header.Values("Www-Authenticate"))
	switch {
	case bearer != nil:
		if s := bearer["scope"]; to.scope == "" {
			to.scope = s
		}
		return true, t.fetchToken(req, bearer, to, authorization)
	case basic && strings.HasPrefix(authorization, "Basic "):
		if t.stillGood(login{to.host, sent}, func() bool { return t.enters(req, sent) }) {
			return false, nil // it is this that we may not have
		}
		again, err := t.renew(req.Context(), login{to.host, sent})
		return again != sent, err
	case basic:
		cred, err := t.keys.get(req.Context())
		if err != nil || cred.Username == "" {
			return false, err
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		t.basic[to.host] = true
		return true, nil
	}
	return false, nil
}

// taken notes that a credential was taken, unless nobody answered.
func (t *authTransport) taken(l login, err error) {
	if err != nil || l.cred == (Credential{}) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.good) >= maxTokens {
		clear(t.good)
	}
	t.good[l] = true
}

// stillGood tells whether a credential that was refused, and was taken before, is
// taken where nothing in particular is asked for. Some registries and realms say 401
// to a user who may not see one repository, and that must not cost the others.
func (t *authTransport) stillGood(l login, ask func() bool) bool {
	t.mu.Lock()
	was := t.good[l]
	t.mu.Unlock()
	if !was || ask() {
		return was
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.good, l)
	return false
}

// enters tells whether the registry that was asked lets a credential in at all.
func (t *authTransport) enters(asked *http.Request, cred Credential) bool {
	base := strings.TrimSuffix(t.endpoint(asked.URL).String(), "/")
	req, err := http.NewRequestWithContext(asked.Context(), http.MethodGet, base+"/v2/", nil)
	if err != nil {
		return false
	}
	req.SetBasicAuth(cred.Username, cred.Password)
	resp, err := t.own.RoundTrip(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// renew has a credential taken for wrong, and returns the one to use instead: that
// of a helper may only have run out. It may be the same.
func (t *authTransport) renew(ctx context.Context, was login) (Credential, error) {
	t.takeForWrong(was)
	return t.keys.get(ctx)
}

func (t *authTransport) takeForWrong(l login) {
	t.keys.drop(l.cred) // first: who finds it wrong finds another one
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.wrong) >= maxTokens {
		clear(t.wrong)
	}
	t.wrong[l] = time.Now().Add(refusedFor)
}

// credential is the one to send to a host, unless it was refused there lately.
func (t *authTransport) credential(ctx context.Context, host string) (Credential, error) {
	cred, err := t.keys.get(ctx)
	if err != nil {
		return Credential{}, err
	}
	wrong := t.isWrong(login{host, cred})
	if wrong == nil {
		return cred, nil
	}
	again, err := t.keys.get(ctx) // somebody may have renewed it just now
	if err != nil || again == cred {
		return Credential{}, cmp.Or(err, wrong)
	}
	return again, nil
}

// isWrong is that a credential was refused lately where it is to be sent, or nil.
func (t *authTransport) isWrong(l login) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l.cred == (Credential{}) || !time.Now().Before(t.wrong[l]) {
		return nil
	}
	return &Error{Status: http.StatusUnauthorized, Remembered: true, Message: "the configured credentials were refused moments ago"}
}

// wasRefused is what was said lately to a request for to, or nil.
func (t *authTransport) wasRefused(to audience) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.refused[to]
	if !ok || !time.Now().Before(r.until) {
		delete(t.refused, to)
		return nil
	}
	return r.err
}

// refuse has a refusal believed for a while.
func (t *authTransport) refuse(to audience, status int) {
	lasts := refusedFor
	if t.keys.ask == nil {
		lasts = refusedAnonymousFor
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.refused) >= maxTokens {
		clear(t.refused)
	}
	t.refused[to] = refusal{&Error{Status: status, Remembered: true, Message: "upstream said so moments ago"}, time.Now().Add(lasts)}
}

// endpoint is the endpoint that u belongs to, or nil.
func (t *authTransport) endpoint(u *url.URL) *url.URL {
	i := slices.IndexFunc(t.endpoints, func(e *url.URL) bool { return e.Scheme == u.Scheme && e.Host == u.Host })
	if i < 0 {
		return nil
	}
	return t.endpoints[i]
}

// authorize adds what is known to be good, and returns the credential if that is
// it.
func (t *authTransport) authorize(req *http.Request, to audience) (Credential, error) {
	t.mu.Lock()
	basic, tok := t.basic[to.host], t.tokens[to]
	t.mu.Unlock()
	if basic {
		cred, err := t.credential(req.Context(), to.host)
		if err != nil {
			return Credential{}, err
		}
		req.SetBasicAuth(cred.Username, cred.Password)
		return cred, nil
	}
	if time.Now().Before(tok.until) {
		req.Header.Set("Authorization", "Bearer "+tok.value)
	}
	return Credential{}, nil
}

// scopeOf is the scope a pull needs: tokens are asked for and kept by it. A
// repository's name may contain the words of a route, so the last one counts.
func scopeOf(path string) string {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return ""
	}
	end := 0
	for _, route := range []string{"/manifests/", "/blobs/", "/tags/list", "/referrers/", "/_oci/", "/_tidemark/", "/_chainguard/"} {
		end = max(end, strings.LastIndex(rest, route))
	}
	if end == 0 {
		return ""
	}
	return "repository:" + rest[:end] + ":pull"
}

// tokenTimeout bounds one request to a token realm.
const tokenTimeout = 5 * time.Second

// fetchToken gets a token, once for all who need it. rejected is the
// Authorization that was refused: a token that someone else has got meanwhile
// is as good as a new one.
func (t *authTransport) fetchToken(req *http.Request, challenge map[string]string, to audience, rejected string) error {
	realm, err := t.checkRealm(req.URL, challenge["realm"])
	if err != nil {
		return err
	}
	result := t.flights.DoChan(to.host+" "+to.scope, func() (any, error) {
		t.mu.Lock()
		tok, ok := t.tokens[to]
		delete(t.basic, to.host) // it asks for tokens now
		t.mu.Unlock()
		if ok && time.Now().Before(tok.until) && "Bearer "+tok.value != rejected {
			return nil, nil
		}
		// It is everybody's: the one who asked first may leave, and what is traced of
		// his request is not of this one.
		ctx, cancel := context.WithTimeout(context.Background(), tokenTimeout)
		defer cancel()
		tok, err := t.tokenFor(ctx, realm, challenge["service"], to.scope)
		if err != nil {
			var told *Error
			if errors.As(err, &told) && (told.Status == http.StatusUnauthorized || told.Status == http.StatusForbidden) {
				t.refuse(to, told.Status)
			}
			return nil, err
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		if len(t.tokens) >= maxTokens {
			clear(t.tokens) // they are cheap to get again
		}
		t.tokens[to] = tok
		return nil, nil
	})
	_, err = await(req.Context(), result)
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

// maxTokens bounds the tokens kept for one upstream, one for each repository.
const maxTokens = 10_000

// checkRealm parses the realm of a challenge and refuses one that the upstream
// has no business to send credentials to.
func (t *authTransport) checkRealm(asked *url.URL, realm string) (*url.URL, error) {
	u, err := url.Parse(realm)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") {
		return nil, &Error{Nonsense: true, Err: fmt.Errorf("token realm %.200q is not an address", realm)}
	}
	if asked.Scheme == "https" && u.Scheme != "https" {
		return nil, &Error{Nonsense: true, Err: fmt.Errorf("token realm %s is not https, the upstream is", u.Host)}
	}
	host := u.Hostname()
	if host == asked.Hostname() || slices.Contains(t.realms, host) || slices.Contains(t.realms, u.Host) || sameDomain(host, asked.Hostname()) {
		return u, nil
	}
	return nil, &Error{Nonsense: true, Err: fmt.Errorf("token realm %s does not belong to the upstream; if it is right, list it under token_realms", u.Host)}
}

// sameDomain tells whether two hosts are below one registrable domain.
func sameDomain(a, b string) bool {
	da, err := publicsuffix.EffectiveTLDPlusOne(a)
	if err != nil {
		return false
	}
	db, err := publicsuffix.EffectiveTLDPlusOne(b)
	return err == nil && da == db
}

const (
	maxToken     = 64 << 10         // bytes of a token response
	defaultToken = 60 * time.Second // validity when the response does not tell
)

// tokenFor gets a token with the credential of now. One that the realm refuses may
// have run out: it is asked for anew, once.
func (t *authTransport) tokenFor(ctx context.Context, realm *url.URL, service, scope string) (token, error) {
	cred, err := t.credential(ctx, realm.Host)
	if err != nil {
		return token{}, err
	}
	tok, err := t.askRealm(ctx, realm, service, scope, cred)
	var told *Error
	l := login{realm.Host, cred}
	if !errors.As(err, &told) || told.Status != http.StatusUnauthorized || cred == (Credential{}) {
		t.taken(l, err)
		return tok, err
	}
	if t.stillGood(l, func() bool { _, err := t.askRealm(ctx, realm, service, "", cred); return err == nil }) {
		return tok, err // it is the scope that we may not have
	}
	again, kerr := t.renew(ctx, l)
	if kerr != nil || again == cred {
		return tok, err
	}
	tok, err = t.askRealm(ctx, realm, service, scope, again)
	if errors.As(err, &told) && told.Status == http.StatusUnauthorized {
		t.takeForWrong(login{realm.Host, again})
	}
	t.taken(login{realm.Host, again}, err)
	return tok, err
}

// askRealm requests a token as distribution's token specification says: with GET
// and a password, or with POST and an identity token (its OAuth 2 form).
func (t *authTransport) askRealm(ctx context.Context, realm *url.URL, service, scope string, cred Credential) (token, error) {
	req, err := tokenRequest(ctx, *realm, service, scope, cred)
	if err != nil {
		return token{}, err
	}
	u := req.URL
	asked := time.Now()
	// No redirects: credentials go to the realm that was checked and no further.
	var resp *http.Response
	if slices.ContainsFunc(t.endpoints, func(e *url.URL) bool { return e.Hostname() == u.Hostname() }) ||
		slices.Contains(t.realms, u.Hostname()) || slices.Contains(t.realms, u.Host) {
		resp, err = t.own.RoundTrip(req)
	} else {
		resp, err = t.foreign.RoundTrip(req)
	}
	if err != nil {
		return token{}, fmt.Errorf("token from %s: %w", realm.Host, err)
	}
	defer resp.Body.Close()
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
	case code == http.StatusUnauthorized, code == http.StatusForbidden, code == http.StatusTooManyRequests, code >= 500:
		return token{}, &Error{Status: code, RetryAfter: retryAfter(resp.Header.Get("Retry-After")), Message: "token from " + realm.Host + " refused"}
	default: // a realm's 404 says nothing about what was to be pulled
		return token{}, &Error{Nonsense: true, Err: fmt.Errorf("token from %s: %s", realm.Host, resp.Status)}
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxToken+1))
	if err != nil {
		return token{}, fmt.Errorf("token from %s: %w", realm.Host, err)
	}
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"`
	}
	if len(body) > maxToken {
		err = fmt.Errorf("larger than %d bytes", maxToken)
	} else if err = json.Unmarshal(body, &answer); err == nil && answer.Token == "" {
		if answer.Token = answer.AccessToken; answer.Token == "" {
			err = errors.New("empty")
		}
	}
	if err != nil {
		return token{}, &Error{Nonsense: true, Err: fmt.Errorf("token from %s: %w", realm.Host, err)}
	}
	valid := defaultToken
	if answer.ExpiresIn > 0 {
		valid = time.Duration(min(answer.ExpiresIn, 24*60*60)) * time.Second
	}
	return token{answer.Token, asked.Add(valid * 9 / 10)}, nil // renewed before it expires
}

// oauthClient is the client_id of token requests, which realms require.
const oauthClient = "tidemark"

func tokenRequest(ctx context.Context, realm url.URL, service, scope string, cred Credential) (*http.Request, error) {
	q := realm.Query()
	if cred.IdentityToken != "" {
		q = url.Values{"grant_type": {"refresh_token"}, "refresh_token": {cred.IdentityToken}, "client_id": {oauthClient}}
	}
	if service != "" {
		q.Set("service", service)
	}
	if scope != "" {
		q.Set("scope", scope)
	}
	if cred.IdentityToken != "" {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(q.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		return req, err
	}
	realm.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
	if err == nil && cred.Username != "" {
		req.SetBasicAuth(cred.Username, cred.Password)
	}
	return req, err
}

// parseChallenges reads the challenges that can be answered (RFC 9110, section
// 11.6.1): the parameters of Bearer, nil without one, and whether there is
// Basic. A header may hold several.
func parseChallenges(headers []string) (bearer map[string]string, basic bool) {
	var params map[string]string
	scheme := func(name string) {
		params = make(map[string]string)
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "bearer":
			bearer = params
		case "basic":
			basic = true
		}
	}
	for _, rest := range headers {
		for rest = strings.TrimLeft(rest, ", "); rest != ""; rest = strings.TrimLeft(rest, ", ") {
			before, after, ok := strings.Cut(rest, "=")
			words := strings.Split(before, ",")
			for _, alone := range words[:len(words)-1] { // schemes without parameters
				scheme(alone)
			}
			key := words[len(words)-1]
			if name, first, spaced := strings.Cut(strings.TrimSpace(key), " "); spaced || !ok {
				scheme(name)
				key = first
			}
			if !ok {
				break
			}
			var value string
			if quoted, ok := strings.CutPrefix(after, `"`); ok {
				value, rest, _ = strings.Cut(quoted, `"`)
			} else {
				value, rest, _ = strings.Cut(after, ",")
			}
			if params != nil {
				params[strings.ToLower(strings.TrimSpace(key))] = strings.TrimSpace(value)
			}
		}
	}
	return bearer, basic
}
