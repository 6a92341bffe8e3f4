// Package intercept turns CONNECT into an ordinary request: a client that uses it
// as its proxy reaches each registry under the registry's own name, and is
// answered here, with a certificate minted for that name.
package intercept

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"tidemark/proxy/ca"
)

// Options configure a Proxy. Addr, Hosts and CA are required.
type Options struct {
	Addr string

	// Hosts are answered here, each on port 443 unless it names another. Tunnel are
	// passed on untouched. The rest of the world is refused.
	Hosts, Tunnel []string

	CA *ca.Authority // which can sign for all of Hosts

	// Login, if set, tells whether a client that names itself (Proxy-Authorization:
	// Basic) may use the proxy.
	Login func(user, password string) bool

	// Resolver finds the hosts of tunnels. Nil is the system's.
	Resolver *net.Resolver

	Log zerolog.Logger
}

// A Proxy takes CONNECT. As a net.Listener it hands out the connections of the
// clients who want one of its hosts, on which TLS is to be spoken with TLS().
type Proxy struct {
	o      Options
	hosts  map[string]string // host:port -> the name to have a certificate for
	tunnel map[string]bool   // host:port
	mint   *mint

	ln      net.Listener
	srv     *http.Server
	conns   chan net.Conn // to be accepted
	closed  chan struct{} // no more of them
	closing sync.Once

	mu      sync.Mutex
	ended   bool // no tunnel may begin any more
	tunnels sync.WaitGroup
}

const (
	headerTimeout = 10 * time.Second // for a client to say what it wants
	dialTimeout   = 5 * time.Second  // for the host of a tunnel to answer
	halfClosed    = time.Minute      // for a client to end what the host has ended
	maxHeader     = 64 << 10
)

// New returns the proxy that o describes. It starts nothing.
func New(o Options) *Proxy {
	p := &Proxy{
		o: o, hosts: make(map[string]string), tunnel: make(map[string]bool), mint: newMint(o.CA),
		conns: make(chan net.Conn), closed: make(chan struct{}),
	}
	for _, h := range o.Hosts {
		target := withPort(h)
		p.hosts[target], _, _ = net.SplitHostPort(target)
	}
	for _, h := range o.Tunnel {
		p.tunnel[withPort(h)] = true
	}
	p.srv = &http.Server{
		Handler: http.HandlerFunc(p.serve), MaxHeaderBytes: maxHeader, ReadHeaderTimeout: headerTimeout, IdleTimeout: headerTimeout,
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}, // a tunnel needs the connection
	}
	return p
}

// withPort is host:port in lower case. Without a port it is that of https.
func withPort(host string) string {
	host = strings.ToLower(host)
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	return net.JoinHostPort(strings.Trim(host, "[]"), "443")
}

// CertificateHosts are the names for which certificates may be minted.
func CertificateHosts(hosts []string) []string {
	var names []string
	for _, h := range hosts {
		name, _, err := net.SplitHostPort(withPort(h))
		if err == nil && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// Listen takes the address.
func (p *Proxy) Listen() error {
	ln, err := net.Listen("tcp", p.o.Addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	p.ln = ln
	return nil
}

// Address is what the proxy listens on.
func (p *Proxy) Address() net.Addr { return p.ln.Addr() }

// Run takes CONNECT until ctx ends. Tunnels end with it; connections that were
// handed out are others' to end.
func (p *Proxy) Run(ctx context.Context) error {
	p.srv.BaseContext = func(net.Listener) context.Context { return ctx }
	failed := make(chan error, 1)
	go func() { failed <- p.srv.Serve(p.ln) }()
	select {
	case err := <-failed:
		return fmt.Errorf("intercept %s: %w", p.o.Addr, err)
	case <-ctx.Done():
	}
	err := p.srv.Close() // who has only just connected has asked for nothing yet
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	p.tunnels.Wait()
	if serr := <-failed; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// Accept implements net.Listener.
func (p *Proxy) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener: no more connections are handed out.
func (p *Proxy) Close() error {
	p.closing.Do(func() { close(p.closed) })
	return nil
}

// Addr implements net.Listener.
func (p *Proxy) Addr() net.Addr { return p.ln.Addr() }

// serve answers a request to the proxy itself.
func (p *Proxy) serve(w http.ResponseWriter, r *http.Request) {
	who, ok := p.mayUse(r)
	if !ok {
		w.Header().Set("Proxy-Authenticate", `Basic realm="tidemark"`)
		http.Error(w, "tidemark: this proxy wants a name and a password: HTTPS_PROXY=http://user:password@host:port", http.StatusProxyAuthRequired)
		return
	}
	if r.Method != http.MethodConnect {
		http.Error(w, "tidemark: this is a proxy for https (CONNECT) to registries; the registry itself listens on registry.listen", http.StatusForbidden)
		return
	}
	target := strings.ToLower(r.RequestURI) // host:port and nothing else (RFC 9112, section 3.2.3)
	name, ours := p.hosts[target]
	switch {
	case ours:
		p.intercept(w, r, name, who)
	case p.tunnel[target]:
		p.pass(w, r, target)
	default:
		p.o.Log.Warn().Str("target", fmt.Sprintf("%.300s", r.RequestURI)).Str("client", r.RemoteAddr).Msg("a client was refused a host that is neither in upstreams nor in registry.intercept.tunnel")
		http.Error(w, fmt.Sprintf("tidemark: %.300q is neither an upstream (upstreams) nor a host to be tunnelled (registry.intercept.tunnel) in tidemark's configuration; add it to one of them", r.RequestURI), http.StatusForbidden)
	}
}

// A Client is who named itself to the proxy.
type Client struct{ User, Password string }

// mayUse tells whether a client may use the proxy, and who it is.
func (p *Proxy) mayUse(r *http.Request) (c Client, ok bool) {
	if p.o.Login == nil {
		return Client{}, true
	}
	named := &http.Request{Header: http.Header{"Authorization": r.Header.Values("Proxy-Authorization")}}
	c.User, c.Password, ok = named.BasicAuth()
	return c, ok && p.o.Login(c.User, c.Password)
}

// intercept hands the client's connection out.
func (p *Proxy) intercept(w http.ResponseWriter, r *http.Request, name string, who Client) {
	c, err := hijack(w)
	if err != nil {
		p.o.Log.Debug().Err(err).Msg("a client left while it was connected")
		return
	}
	c.name, c.target, c.who = name, strings.ToLower(r.RequestURI), who
	select {
	case p.conns <- c:
	case <-p.closed:
		c.Close()
	}
}

// hijack takes the connection over and tells the client that it is connected.
func hijack(w http.ResponseWriter) (*conn, error) {
	raw, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	_ = raw.SetDeadline(time.Time{}) // the server had one for the head
	c := &conn{Conn: raw}
	if n := buffered.Reader.Buffered(); n > 0 {
		c.early = make([]byte, n) // a client that does not wait to be connected
		if _, err := io.ReadFull(buffered, c.early); err != nil {
			raw.Close()
			return nil, err
		}
	}
	if _, err := io.WriteString(raw, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// A conn is a client's connection to one host.
type conn struct {
	net.Conn
	name   string // for which a certificate is minted
	target string // host:port, as the client asked for it
	who    Client // if clients must say
	early  []byte // what it sent before it was connected; read first
}

func (c *conn) Read(b []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(b, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// pass connects the client to a host and copies both ways.
func (p *Proxy) pass(w http.ResponseWriter, r *http.Request, target string) {
	if !p.begin() {
		http.Error(w, "tidemark: this server is shutting down", http.StatusServiceUnavailable)
		return
	}
	defer p.tunnels.Done()
	ctx, cancel := context.WithTimeout(r.Context(), dialTimeout)
	defer cancel()
	there, err := (&net.Dialer{Resolver: p.o.Resolver, Control: elsewhere(target)}).DialContext(ctx, "tcp", target)
	if err != nil {
		http.Error(w, fmt.Sprintf("tidemark: tunnel to %s: %v", target, err), http.StatusBadGateway)
		return
	}
	defer there.Close()
	here, err := hijack(w)
	if err != nil {
		p.o.Log.Debug().Err(err).Msg("a client left while it was connected")
		return
	}
	defer here.Close()
	defer context.AfterFunc(r.Context(), func() { there.Close(); here.Close() })() // Run ends
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(there, here) // either end may hang up
		_ = there.(*net.TCPConn).CloseWrite()
	}()
	defer func() { there.Close(); here.Close(); <-done }()
	_, _ = io.Copy(here, there)
	if half, ok := here.Conn.(*net.TCPConn); ok {
		_ = half.CloseWrite() // the client may still have something to say
	}
	select {
	case <-done:
	case <-time.After(halfClosed):
	case <-r.Context().Done():
	}
}

// begin counts a tunnel, unless the proxy has ended.
func (p *Proxy) begin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended {
		p.tunnels.Add(1)
	}
	return !p.ended
}

// elsewhere refuses to be led to this machine or its link by the name of a host:
// names mean what somebody else says. An address in the configuration is meant.
func elsewhere(target string) func(_, address string, _ syscall.RawConn) error {
	host, _, _ := net.SplitHostPort(target)
	if _, err := netip.ParseAddr(host); err == nil || host == "localhost" {
		return nil
	}
	return func(_, address string, _ syscall.RawConn) error {
		ap, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		if a := ap.Addr().Unmap(); a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast() {
			return fmt.Errorf("%s is %s, which is this machine or its link; list the address itself if that is meant", host, a)
		}
		return nil
	}
}
