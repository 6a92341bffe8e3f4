package upstream

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// A Pushed is a request that changes a repository, as it is to be sent.
type Pushed struct {
	Method string
	Path   string // escaped, below the endpoint's own
	Query  url.Values
	Header http.Header
	Body   io.Reader
	Length int64 // of Body in bytes, -1 when not known
}

// Push sends p to the first endpoint, once, with the rights of the caller. What
// comes back is the answer, whatever its status, but for one that refuses the
// caller or cannot be believed: that is an error. The caller closes the body. How a
// push ends says nothing about pulls, and the client may be what made it fail: the
// breaker is not told.
func (u *Upstream) Push(ctx context.Context, p *Pushed) (*http.Response, error) {
	op := p.Method + " " + p.Path
	if u.offline {
		return nil, &Error{Upstream: u.name, Op: op, Err: ErrOffline}
	}
	e := u.endpoints[0]
	if refusal := e.breaker.open(); refusal != nil && !u.isOthersLimit(refusal) {
		refusal.Op, refusal.Caller = op, u.caller
		return nil, refusal
	}
	target := strings.TrimSuffix(e.url.String(), "/") + p.Path
	if q := p.Query.Encode(); q != "" {
		target += "?" + q
	}
	req, err := http.NewRequestWithContext(ctx, p.Method, target, p.Body)
	if err != nil {
		return nil, &Error{Upstream: u.name, Op: op, Err: err}
	}
	req.ContentLength = p.Length
	if p.Length == 0 {
		req.Body = http.NoBody
	}
	for k, v := range p.Header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", u.userAgent)
	if t, ok := u.client.Transport.(clientTransport); ok && t.authorization != "" {
		req.Header.Set("Authorization", t.authorization)
	}
	resp, err := u.pushing.RoundTrip(req) // no redirects: what was sent cannot be sent again
	if err != nil {
		ue := &Error{Upstream: u.name, Op: op, Err: err, Caller: u.caller}
		u.observe(0)
		return nil, ue
	}
	u.observe(resp.StatusCode)
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500 {
		defer resp.Body.Close()
		return nil, u.refusal(resp, op)
	}
	return resp, nil
}
