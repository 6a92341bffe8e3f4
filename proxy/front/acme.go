package front

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/rs/zerolog"
	"go.uber.org/zap"
)

// ACMEOptions say where certificates come from. All but Email and Roots is
// required.
type ACMEOptions struct {
	Dir       string // where they are kept, with their keys and the account
	Hosts     []string
	Directory string // address of the ACME server (RFC 8555, section 7.1.1)
	Email     string
	Roots     *x509.CertPool // to trust when the server is asked; nil is the system's

	// HTTPAddr is where HTTP-01 is answered while the server checks a name.
	HTTPAddr string
	// TLSAddr is the listener that the certificates are for: it answers TLS-ALPN-01.
	TLSAddr string

	Log zerolog.Logger
}

// ACME are certificates of a public authority, which checks that the hosts are
// ours. certmagic gets them, keeps them and renews them.
type ACME struct {
	o     ACMEOptions
	cfg   *certmagic.Config
	certs *certmagic.Cache
}

// NewACME returns the certificates that o describes. It starts nothing.
func NewACME(o ACMEOptions) *ACME { return &ACME{o: o} }

func hostPort(addr string) (host string, port int, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err == nil {
		port, err = strconv.Atoi(p)
	}
	if err != nil {
		return "", 0, fmt.Errorf("acme: address %q: %w", addr, err)
	}
	return host, port, nil
}

// Start returns the configuration of a listener that presents the certificates that
// there are, and answers the server that checks its names.
func (a *ACME) Start() (*tls.Config, error) {
	host, httpPort, err := hostPort(a.o.HTTPAddr)
	if err != nil {
		return nil, err
	}
	_, tlsPort, err := hostPort(a.o.TLSAddr)
	if err != nil {
		return nil, err
	}
	logger := zap.New(zapToZerolog{log: a.o.Log})
	cfg, certs := manage(certmagic.Config{
		Storage: &certmagic.FileStorage{Path: a.o.Dir}, DefaultServerName: a.o.Hosts[0], Logger: logger,
	})
	cfg.Issuers = []certmagic.Issuer{certmagic.NewACMEIssuer(cfg, certmagic.ACMEIssuer{
		CA: a.o.Directory, Email: a.o.Email, Agreed: true, TrustedRoots: a.o.Roots, Logger: logger,
		ListenHost: host, AltHTTPPort: httpPort, AltTLSALPNPort: tlsPort,
	})}
	a.cfg, a.certs = cfg, certs
	config := tlsConfig(cfg.GetCertificate)
	config.NextProtos = append(config.NextProtos, acmeTLS)
	return config, nil
}

// Manage loads the certificates, gets those that are not here yet, and renews all
// until Stop. It does not wait: the server must find the listener, which is there
// before it is called, and tidemark starts without a network, too.
func (a *ACME) Manage(ctx context.Context) error {
	if err := a.cfg.ManageAsync(ctx, a.o.Hosts); err != nil {
		return fmt.Errorf("acme certificates: %w", err)
	}
	return nil
}

// acmeTLS is the protocol in which an ACME server checks a name (RFC 8737). What
// speaks it is never answered a request.
const acmeTLS = "acme-tls/1"

// Stop ends renewals. It is called once, after Start.
func (a *ACME) Stop() { a.certs.Stop() }

// Missing are the hosts that have no certificate now.
func (a *ACME) Missing() []string {
	var out []string
	for _, h := range a.o.Hosts {
		valid := false
		for _, c := range a.certs.AllMatchingCertificates(h) {
			valid = valid || !c.Empty() && time.Now().Before(c.Leaf.NotAfter)
		}
		if !valid {
			out = append(out, h)
		}
	}
	return out
}
