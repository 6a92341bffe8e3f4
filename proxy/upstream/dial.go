package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http/httpproxy"
)

// A place is a kind of network. A redirect or a token realm may lead to the
// open internet, and otherwise only to where the upstream itself is: a registry
// on the internet must not make us talk to the machines beside us.
type place uint32

const (
	loopback place = 1 << iota
	private
	linkLocal
	nowhere // unspecified, multicast: never dialled
)

var sharedSpace = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

// placeOf is 0 for the open internet.
func placeOf(a netip.Addr) place {
	a = a.Unmap()
	switch {
	case a.IsLoopback():
		return loopback
	case a.IsLinkLocalUnicast():
		return linkLocal
	case a.IsPrivate(), sharedSpace.Contains(a):
		return private
	case !a.IsValid(), a.IsUnspecified(), a.IsMulticast():
		return nowhere
	}
	return 0
}

// A dialer connects to an upstream's own hosts, and remembers where they are,
// and to the hosts they point to, if they may.
type dialer struct {
	timeout time.Duration
	home    atomic.Uint32 // places where the upstream's own hosts were found
}

// own dials a host of the configuration.
func (d *dialer) own(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: d.timeout}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if ap, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil && !isProxy(addr) {
		d.home.Or(uint32(placeOf(ap.Addr())))
	}
	return conn, nil
}

// foreign dials a host that an answer named. The address is checked after its
// name is resolved, so that a name cannot mean one thing here and another there.
func (d *dialer) foreign(ctx context.Context, network, addr string) (net.Conn, error) {
	nd := &net.Dialer{Timeout: d.timeout}
	if !isProxy(addr) {
		nd.Control = func(_, resolved string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(resolved)
			if err != nil {
				return err
			}
			return d.allowed(ap.Addr(), addr)
		}
	}
	return nd.DialContext(ctx, network, addr)
}

func (d *dialer) allowed(a netip.Addr, name string) error {
	if p := placeOf(a); p != 0 && place(d.home.Load())&p == 0 {
		return &Error{Nonsense: true, Err: fmt.Errorf("the answer leads to %s (%s), a private network in which the upstream itself is not", name, a)}
	}
	return nil
}

// maxRedirects is more than any registry needs to get to its object store.
const maxRedirects = 5

// checkRedirect is http.Client.CheckRedirect. Credentials need no care here:
// only the transport adds them, and only for the upstream's own endpoints.
func (d *dialer) checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return &Error{Nonsense: true, Err: fmt.Errorf("more than %d redirects", maxRedirects)}
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return &Error{Nonsense: true, Err: errors.New("redirect from https to " + req.URL.Scheme)}
	}
	if a, err := netip.ParseAddr(req.URL.Hostname()); err == nil {
		return d.allowed(a, req.URL.Host)
	}
	return nil
}

// isProxy tells the environment's HTTP proxy, which is the operator's choice
// and not an upstream's. Behind one, names are resolved by it and only literal
// addresses can be checked.
func isProxy(addr string) bool {
	c := httpproxy.FromEnvironment()
	for _, p := range []string{c.HTTPProxy, c.HTTPSProxy} {
		u, err := url.Parse(p)
		if err != nil || u.Host == "" {
			if u, err = url.Parse("http://" + p); err != nil {
				continue
			}
		}
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		if net.JoinHostPort(u.Hostname(), port) == addr {
			return true
		}
	}
	return false
}

// newTransport returns a transport that waits for the head of an answer as long as
// the context of the request lets it, if header is 0.
func newTransport(dial func(context.Context, string, string) (net.Conn, error), tlsConfig *tls.Config, o Options, header time.Duration) *http.Transport {
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dial,
		TLSClientConfig:        tlsConfig.Clone(),
		TLSHandshakeTimeout:    orDefault(o.ConnectTimeout, connectTimeout),
		ResponseHeaderTimeout:  header,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // bytes are stored and hashed as sent
		ForceAttemptHTTP2:      true,
		ReadBufferSize:         64 << 10,
	}
}
