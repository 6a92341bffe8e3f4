package notify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// A Poster posts to one address, as Standard Webhooks 1.0.0 has senders behave: it
// follows no redirects, takes 2xx alone for done and 410 for an end, and does as
// Retry-After asks. Paths and queries of webhooks are often secrets: no error has them.
type Poster struct {
	address *url.URL
	client  *http.Client
}

// NewPoster returns a poster to an address.
func NewPoster(address string) (*Poster, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" {
		return nil, errors.New("the address cannot be read") // which may hold a secret
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = http.ProxyFromEnvironment
	return &Poster{u, &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}, nil
}

// afterMost bounds what Retry-After can ask for.
const afterMost = 24 * time.Hour

// Post sends a body. An error is a *Failure.
func (p *Poster) Post(ctx context.Context, head http.Header, body []byte) error {
	return p.send(ctx, http.MethodPost, p.address, head, body)
}

// Put is Post with PUT, to a path below the address.
func (p *Poster) Put(ctx context.Context, head http.Header, body []byte, path ...string) error {
	return p.send(ctx, http.MethodPut, p.address.JoinPath(path...), head, body)
}

func (p *Poster) send(ctx context.Context, method string, to *url.URL, head http.Header, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, to.String(), bytes.NewReader(body))
	if err != nil {
		return &Failure{Err: errors.New("the address cannot be posted to")}
	}
	for k, v := range head {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", "tidemark")
	resp, err := p.client.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the address
		}
		return &Failure{Err: fmt.Errorf("post to %s: %w", p.address.Host, err)}
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil && resp.StatusCode/100 != 2 {
		return &Failure{Err: fmt.Errorf("post to %s: %w", p.address.Host, err)}
	}
	if resp.StatusCode/100 == 2 {
		return nil
	}
	f := &Failure{Err: fmt.Errorf("post to %s: %s", p.address.Host, resp.Status), Gone: resp.StatusCode == http.StatusGone}
	if s := resp.Header.Get("Retry-After"); s != "" {
		if n, err := strconv.Atoi(s); err == nil && n > 0 {
			f.After = min(afterMost, time.Duration(n)*time.Second)
		} else if at, err := http.ParseTime(s); err == nil {
			f.After = min(afterMost, max(0, time.Until(at)))
		}
	}
	return f
}
