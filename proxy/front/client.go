package front

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"slices"
	"sync"

	"github.com/rs/zerolog"
)

// RequireClients returns cfg for clients who present a certificate of the
// authority in a file, and for no others. The file is read again when it has
// changed; while it cannot be, the authority from before counts.
func RequireClients(cfg *tls.Config, caFile string, log zerolog.Logger) (*tls.Config, error) {
	f := &clientCA{open: cfg, log: log}
	f.file = follower{paths: []string{caFile}, read: func() error { return f.read(caFile) }}
	if err := f.file.load(); err != nil {
		return nil, fmt.Errorf("CA of clients: %w", err)
	}
	strict := cfg.Clone()
	strict.GetConfigForClient = f.config
	return strict, nil
}

// clientCA is an authority of clients that follows its file.
type clientCA struct {
	open *tls.Config // which asks nobody for a certificate
	log  zerolog.Logger

	mu     sync.Mutex
	file   follower
	strict *tls.Config
}

// read makes the configuration for clients of the authority in a file. Sessions that
// another one had let begin are not resumed with it: crypto/tls checks the chain again.
func (f *clientCA) read(path string) error {
	pem, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s holds no PEM certificate", path)
	}
	f.strict = f.open.Clone()
	f.strict.ClientAuth, f.strict.ClientCAs = tls.RequireAndVerifyClientCert, pool
	return nil
}

// config is tls.Config.GetConfigForClient.
func (f *clientCA) config(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if slices.Equal(hello.SupportedProtos, []string{acmeTLS}) {
		return f.open, nil // the ACME server: net/http hangs up after the handshake
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.file.follow(); err != nil {
		f.log.Warn().Err(err).Msg("the CA of clients could not be read again; the old one counts")
	}
	return f.strict, nil
}

// ClientName is what the certificate of a client calls it, "" without one.
func ClientName(r *http.Request) string {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return ""
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName
}
