package upstream

import (
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
	own, foreign       http.RoundTripper
	endpoints          []*url.URL
	realms             []string
	username, password string

	flights singleflight.Group // one token request for each scope at a time

	mu     sync.Mutex
	basic  bool             // the upstream asked for Basic
	tokens map[string]token // by scope
}

type token struct {
	value string
	until time.Time
}

func (t *authTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if !t.isEndpoint(req.URL) {
		return t.foreign.RoundTrip(req)
	}
	scope := scopeOf(req.URL.Path)
	first := req.Clone(req.Context())
	sent := t.authorize(first, scope)
	resp, err := t.own.RoundTrip(first)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	scheme, params := parseChallenge(resp.Header.Values("Www-Authenticate"))
	switch {
	case scheme == "basic" && t.username != "" && !sent:
		t.mu.Lock()
		t.basic = true
		t.mu.Unlock()
	case scheme == "bearer":
		if s := params["scope"]; s != "" && scope == "" {
			scope = s
		}
		if err := t.fetchToken(req, params, scope, first.Header.Get("Authorization")); err != nil {
			resp.Body.Close()
			return nil, err
		}
	default:
		return resp, nil
	}
	_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBody) // so that the connection is used again
	resp.Body.Close()
	second := req.Clone(req.Context())
	t.authorize(second, scope)
	return t.own.RoundTrip(second)
}

func (t *authTransport) isEndpoint(u *url.URL) bool {
	return slices.ContainsFunc(t.endpoints, func(e *url.URL) bool { return e.Scheme == u.Scheme && e.Host == u.Host })
}

// authorize adds what is known to be good for scope, and tells whether there
// was anything.
func (t *authTransport) authorize(req *http.Request, scope string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.basic {
		req.SetBasicAuth(t.username, t.password)
		return true
	}
	tok, ok := t.tokens[scope]
	if !ok || time.Now().After(tok.until) {
		return false
	}
	req.Header.Set("Authorization", "Bearer "+tok.value)
	return true
}

// scopeOf is the scope a pull needs: tokens are asked for and kept by it.
func scopeOf(path string) string {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return ""
	}
	for _, route := range []string{"/manifests/", "/blobs/", "/tags/list"} {
		if i := strings.LastIndex(rest, route); i > 0 {
			return "repository:" + rest[:i] + ":pull"
		}
	}
	return ""
}

// tokenTimeout bounds one request to a token realm.
const tokenTimeout = 10 * time.Second

// fetchToken gets a token for scope, once for all who need it. rejected is the
// Authorization that was refused: a token that someone else has got meanwhile
// is as good as a new one.
func (t *authTransport) fetchToken(req *http.Request, params map[string]string, scope, rejected string) error {
	t.mu.Lock()
	tok, ok := t.tokens[scope]
	t.mu.Unlock()
	if ok && time.Now().Before(tok.until) && "Bearer "+tok.value != rejected {
		return nil
	}
	realm, err := t.checkRealm(req.URL, params["realm"])
	if err != nil {
		return err
	}
	result := t.flights.DoChan(scope, func() (any, error) {
		// It is everybody's: the one who asked first may leave.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(req.Context()), tokenTimeout)
		defer cancel()
		tok, err := t.askRealm(ctx, realm, params["service"], scope)
		if err != nil {
			return nil, err
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		if len(t.tokens) >= maxTokens {
			clear(t.tokens) // they are cheap to get again
		}
		t.tokens[scope] = tok
		return nil, nil
	})
	select {
	case r := <-result:
		return r.Err
	case <-req.Context().Done():
		return context.Cause(req.Context())
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

// askRealm requests a token as distribution's token specification says.
func (t *authTransport) askRealm(ctx context.Context, realm *url.URL, service, scope string) (token, error) {
	u := *realm
	q := u.Query()
	if service != "" {
		q.Set("service", service)
	}
	if scope != "" {
		q.Set("scope", scope)
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return token{}, err
	}
	if t.username != "" {
		req.SetBasicAuth(t.username, t.password)
	}
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
	if resp.StatusCode != http.StatusOK {
		return token{}, &Error{Status: resp.StatusCode, RetryAfter: retryAfter(resp.Header.Get("Retry-After")), Message: "token from " + realm.Host + " refused"}
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

// parseChallenge reads the first challenge that can be answered (RFC 9110,
// section 11.6.1), its scheme in lower case.
func parseChallenge(headers []string) (scheme string, params map[string]string) {
	for _, h := range headers {
		scheme, rest, _ := strings.Cut(strings.TrimSpace(h), " ")
		scheme = strings.ToLower(scheme)
		if scheme != "bearer" && scheme != "basic" {
			continue
		}
		params = make(map[string]string)
		for rest = strings.TrimSpace(rest); rest != ""; {
			key, after, ok := strings.Cut(rest, "=")
			if !ok {
				break
			}
			var value string
			if quoted, ok := strings.CutPrefix(after, `"`); ok {
				value, after, _ = strings.Cut(quoted, `"`)
			} else {
				value, after, _ = strings.Cut(after, ",")
				after = "," + after
			}
			params[strings.ToLower(strings.TrimSpace(key))] = value
			rest = strings.TrimLeft(after, ", ")
		}
		return scheme, params
	}
	return "", nil
}
