package front

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/rs/zerolog"
	"go.uber.org/zap"

	"tidemark/proxy/ca"
)

// tlsConfig is what every listener with TLS shares.
func tlsConfig(get func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: get, NextProtos: []string{"h2", "http/1.1"}}
}

// Files returns the configuration of a listener whose certificate and key are
// read from files, and read again when they have changed. While the new ones
// cannot be read, the old ones are used.
func Files(certFile, keyFile string, log zerolog.Logger) (*tls.Config, error) {
	f := &fileCert{log: log}
	f.files = follower{paths: []string{certFile, keyFile}, read: func() error {
		cert, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return fmt.Errorf("certificate %s with key %s: %w", certFile, keyFile, err)
		}
		f.cert = &cert
		return nil
	}}
	if err := f.files.load(); err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	return tlsConfig(f.get), nil
}

// fileCert is a certificate that follows its files.
type fileCert struct {
	log zerolog.Logger

	mu    sync.Mutex
	files follower
	cert  *tls.Certificate
}

func (f *fileCert) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.files.follow(); err != nil {
		f.log.Warn().Err(err).Msg("certificate could not be read again; the old one is used")
	}
	return f.cert, nil
}

// Internal is a certificate authority of our own, for hosts that no public one
// can know. Its certificate is dir/internal-ca.crt, to be trusted by clients;
// the key beside it has mode 0600. Server certificates are made, kept and
// renewed by certmagic.
type Internal struct {
	dir   string
	hosts []string
	log   zerolog.Logger
	ca    *ca.Authority
	certs *certmagic.Cache
}

const leafValid = 30 * 24 * time.Hour

// NewInternal reads or makes the authority in dir. It starts nothing.
func NewInternal(dir string, hosts []string, log zerolog.Logger) (*Internal, error) {
	authority, err := ca.Open(dir, "internal")
	if err != nil {
		return nil, err
	}
	return &Internal{dir: dir, hosts: hosts, log: log, ca: authority}, nil
}

// CA is the authority whose certificate clients must trust.
func (i *Internal) CA() *ca.Authority { return i.ca }

// Start gets a certificate for every host and returns the configuration of a
// listener that presents them. They are renewed until Stop.
func (i *Internal) Start(ctx context.Context) (*tls.Config, error) {
	cfg, certs := manage(certmagic.Config{
		Storage:           &certmagic.FileStorage{Path: i.dir},
		Issuers:           []certmagic.Issuer{issuer{i.ca}},
		OCSP:              certmagic.OCSPConfig{DisableStapling: true},
		DefaultServerName: i.hosts[0],
		DisableARI:        true,
		Logger:            zap.New(zapToZerolog{log: i.log}),
	})
	i.certs = certs
	if err := cfg.ManageSync(ctx, i.hosts); err != nil {
		i.Stop()
		return nil, fmt.Errorf("internal certificates: %w", err)
	}
	return tlsConfig(cfg.GetCertificate), nil
}

// Stop ends renewals.
func (i *Internal) Stop() { i.certs.Stop() }

// manage has certmagic keep certificates as o says, until the cache is stopped.
func manage(o certmagic.Config) (cfg *certmagic.Config, certs *certmagic.Cache) {
	certs = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return cfg, nil },
		Logger:           o.Logger,
	})
	cfg = certmagic.New(certs, o)
	return cfg, certs
}

// An issuer is an authority as certmagic knows it.
type issuer struct{ *ca.Authority }

// Issue implements certmagic.Issuer.
func (i issuer) Issue(_ context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	chain, err := i.Sign(&x509.Certificate{Subject: csr.Subject, DNSNames: csr.DNSNames, IPAddresses: csr.IPAddresses}, csr.PublicKey, leafValid)
	if err != nil {
		return nil, err
	}
	return &certmagic.IssuedCertificate{Certificate: chain}, nil
}

// IssuerKey implements certmagic.Issuer. Certificates of another CA are not
// taken for ours.
func (i issuer) IssuerKey() string { return "internal-" + i.Serial()[:8] }
