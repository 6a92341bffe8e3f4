package intercept

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"tidemark/proxy/ca"
)

// A mint makes certificates, one for each host, and keeps them while they are
// valid. All have one key, which never leaves memory.
type mint struct {
	ca *ca.Authority

	mu    sync.Mutex
	key   *ecdsa.PrivateKey
	certs map[string]*tls.Certificate
}

const (
	certValid = 7 * 24 * time.Hour
	certFresh = 24 * time.Hour // of which so much must be left
)

func newMint(authority *ca.Authority) *mint {
	return &mint{ca: authority, certs: make(map[string]*tls.Certificate)}
}

// certificate returns one for a host that is configured: there are few.
func (m *mint) certificate(host string) (*tls.Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.certs[host]; c != nil && time.Until(c.Leaf.NotAfter) > certFresh {
		return c, nil
	}
	if m.key == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		m.key = key
	}
	tmpl := new(x509.Certificate)
	if ip := net.ParseIP(host); ip != nil {
		tmpl.IPAddresses = []net.IP{ip} // and no common name, which OpenSSL takes for a host's
	} else {
		tmpl.Subject, tmpl.DNSNames = pkix.Name{CommonName: host}, []string{host}
	}
	chain, err := m.ca.Sign(tmpl, m.key.Public(), certValid)
	if err != nil {
		return nil, fmt.Errorf("certificate for %s: %w", host, err)
	}
	c := &tls.Certificate{PrivateKey: m.key}
	for block, rest := pem.Decode(chain); block != nil; block, rest = pem.Decode(rest) {
		c.Certificate = append(c.Certificate, block.Bytes)
	}
	if c.Leaf, err = x509.ParseCertificate(c.Certificate[0]); err != nil {
		return nil, err
	}
	m.certs[host] = c
	return c, nil
}

// TLS is how the connections that a Proxy hands out are spoken to: with a
// certificate for the host that the client asked to be connected to, and for no
// other.
func (p *Proxy) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
		SessionTicketsDisabled: true, // a session of one host is not to be resumed at another
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, ok := hello.Conn.(*conn)
			if !ok {
				return nil, fmt.Errorf("intercept: a connection that was not handed out: %T", hello.Conn)
			}
			if hello.ServerName != "" && !strings.EqualFold(hello.ServerName, c.name) {
				return nil, fmt.Errorf("connected to %s, and asked for %.100q", c.name, hello.ServerName)
			}
			return p.mint.certificate(c.name)
		},
	}
}

type connKey struct{}

// ClientOf is who named itself to the proxy when the connection of a request began.
// Whether it still may is to be asked again.
func ClientOf(ctx context.Context) (Client, bool) {
	c, ok := ctx.Value(connKey{}).(*conn)
	if !ok {
		return Client{}, false
	}
	return c.who, true
}

// Context is http.Server's ConnContext: it keeps to which host a connection is.
func Context(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if c, ok := c.(*conn); ok {
		return context.WithValue(ctx, connKey{}, c)
	}
	return ctx
}

// Only lets through requests for the host that their connection is to, so that
// no Host header can mean another.
func Only(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(connKey{}).(*conn)
		if !ok {
			panic("intercept: a request on a connection that was not handed out")
		}
		if withPort(r.Host) != c.target {
			http.Error(w, fmt.Sprintf("tidemark: this connection is to %s, not to %.100q", c.target, r.Host), http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}
