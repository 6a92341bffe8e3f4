package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/proxy/upstream/upstreamtest"
)

// clientOf makes a CA of clients in a file, and a client of it by a name.
func clientOf(t *testing.T, file, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "clients"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: parent.NotBefore, NotAfter: parent.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	ca, err := x509.CreateCertificate(rand.Reader, parent, parent, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.CreateCertificate(rand.Reader, leaf, parent, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca}), 0o644); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key}
}

// With client_ca_file only clients with a certificate are answered, and the ledger's
// readers see them by its name.
func TestOnlyClientsWithACertificate(t *testing.T) {
	up := upstreamtest.New()
	t.Cleanup(up.Close)
	img := upstreamtest.NewImage("layer")
	up.Push("library/app", "1", img)
	dir := t.TempDir()
	data, clients := filepath.Join(dir, "data"), filepath.Join(dir, "clients.crt")
	build7 := clientOf(t, clients, "build-7")
	stranger := clientOf(t, filepath.Join(dir, "others.crt"), "stranger")
	s := serve(t, fmt.Sprintf(`data: %s
registry: {listen: "127.0.0.1:0", tls: {mode: internal, client_ca_file: %s}}
admin: {listen: "127.0.0.1:0"}
upstreams:
  docker.io: {endpoints: ["%s"]}
`, data, clients, up.URL()))
	pem, err := os.ReadFile(filepath.Join(data, "tls", "internal-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	get := func(certs ...tls.Certificate) (int, error) {
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: certs}}}
		defer c.CloseIdleConnections()
		resp, err := c.Get(s.registry + "/v2/library/app/manifests/1")
		if err != nil {
			return 0, err
		}
		return resp.StatusCode, resp.Body.Close()
	}
	if status, err := get(build7); status != 200 {
		t.Errorf("a client of the CA gets %d, %v", status, err)
	}
	for name, certs := range map[string][]tls.Certificate{"no certificate": nil, "one of another CA": {stranger}} {
		if status, err := get(certs...); err == nil {
			t.Errorf("with %s a client gets %d, want no answer", name, status)
		}
	}
	if out, _ := s.run("exposure", img.Manifest.Digest.String()); !strings.Contains(out, "build-7") {
		t.Errorf("exposure says\n%s\nwant the client's name", out)
	}
}
