package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// runSetup runs tidemark setup and returns what it prints, and its exit code and
// error as main would have them.
func runSetup(t *testing.T, args ...string) (out string, code int, err error) {
	t.Helper()
	var b bytes.Buffer
	root := newRoot()
	root.SetOut(&b)
	root.SetErr(&b)
	root.SetArgs(append([]string{"setup"}, args...))
	if err = root.ExecuteContext(t.Context()); err != nil {
		code = exitFailed
		var ee *exitError
		if errors.As(err, &ee) {
			code = ee.code
		}
	}
	return b.String(), code, err
}

// mustSetup wants setup to succeed.
func mustSetup(t *testing.T, args ...string) string {
	t.Helper()
	out, code, err := runSetup(t, args...)
	if code != 0 {
		t.Fatalf("tidemark setup %s: exit %d: %v", strings.Join(args, " "), code, err)
	}
	return out
}

// put makes a file below a folder.
func put(t *testing.T, root, path, text string) string {
	t.Helper()
	name := filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// tree is all that is below a folder: names, and what is in the files.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		rel, _ := filepath.Rel(root, path)
		files["/"+filepath.ToSlash(rel)] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// testCA is the PEM certificate of a CA.
func testCA(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// siteConfig writes the configuration of a server with two upstreams, and more.
func siteConfig(t *testing.T, registry string) string {
	t.Helper()
	return put(t, t.TempDir(), "tidemark.yaml", `
data: /srv/tidemark
registry: {`+registry+`}
upstreams:
  docker.io:
  ghcr.io:
  registry.example:5000: {endpoints: ["http://10.0.0.1:5000"], hosts: [old.example]}
`)
}

// The forms of setup that write files, and with which flags.
var setups = [][]string{
	{"docker"}, {"docker", "--no-fallback"}, {"docker", "--intercept", "--proxy", "http://mirror.example:5052"},
	{"containerd"}, {"containerd", "--no-fallback"}, {"podman"}, {"podman", "--no-fallback"},
	{"crio"}, {"buildkit"}, {"k3s"}, {"k3s", "--no-fallback"},
}

// What is written is what is wanted: run again, setup changes nothing and makes no
// backup, with TLS and without.
func TestSetupWritesOnce(t *testing.T) {
	ca := put(t, t.TempDir(), "ca.crt", testCA(t, "test"))
	for _, tls := range [][]string{
		{"-c", siteConfig(t, `listen: "127.0.0.1:5050"`), "--registry", "http://mirror.example:5050"},
		{"-c", siteConfig(t, `listen: "0.0.0.0:5050", tls: {mode: internal, hosts: [mirror.example]}`)},
	} {
		for _, s := range setups {
			args := append(append(slices.Clone(s), tls...), "--write", "--root", t.TempDir())
			if strings.Contains(strings.Join(args, " "), "intercept") || len(tls) == 2 {
				args = append(args, "--ca", ca)
			}
			root := args[slices.Index(args, "--root")+1]
			first := mustSetup(t, args...)
			wrote := tree(t, root)
			if len(wrote) == 0 || strings.Count(first, "wrote ") != len(wrote) || strings.Contains(first, "backup") {
				t.Errorf("%v made %d files and said\n%s", args, len(wrote), first)
			}
			second := mustSetup(t, args...)
			if now := tree(t, root); len(now) != len(wrote) || strings.Count(second, "unchanged ") != len(wrote) {
				t.Errorf("%v a second time: %d files, were %d\n%s", args, len(now), len(wrote), second)
			}
			if strings.Contains(second, "Then:") {
				t.Errorf("%v has something to be done after it did nothing:\n%s", args, second)
			}
		}
	}
}

// Nothing is read but the configuration, and nothing written, without --write; what
// is printed is what would be written.
func TestSetupPrintsWhatItWrites(t *testing.T) {
	config := siteConfig(t, `listen: "127.0.0.1:5050"`)
	for _, s := range setups {
		root := t.TempDir()
		ca := put(t, t.TempDir(), "ca.crt", testCA(t, "test"))
		args := append(slices.Clone(s), "-c", config, "--registry", "https://mirror.example:5050", "--ca", "/nowhere/ca.crt")
		printed := mustSetup(t, args...)
		args[len(args)-1] = ca
		mustSetup(t, append(args, "--write", "--root", root)...)
		for path, text := range tree(t, root) {
			if !strings.Contains(printed, path) {
				t.Errorf("setup %v does not print %s:\n%s", s, path, printed)
			}
			if filepath.Ext(path) == ".crt" || strings.HasSuffix(path, "hosts.toml") && !strings.Contains(path, "docker.io") || strings.HasSuffix(path, ".json") {
				continue // told in another form
			}
			if !strings.Contains(printed, indent(text)) {
				t.Errorf("setup %v does not print\n%s\nbut\n%s", s, indent(text), printed)
			}
		}
	}
}

// A file that changes is kept beside itself, with its mode, under a name that no
// other backup has; it keeps its mode itself, and nothing else is left behind.
func TestSetupKeepsABackup(t *testing.T) {
	root := t.TempDir()
	name := put(t, root, "etc/docker/daemon.json", `{"debug": true}`)
	if err := os.Chmod(name, 0o640); err != nil {
		t.Fatal(err)
	}
	f := file{path: "/etc/docker/daemon.json", mode: 0o644, edit: func(old []byte) ([]byte, error) { return append(bytes.Clone(old), ' '), nil }}
	now := time.Date(2026, 11, 26, 7, 0, 0, 0, time.UTC)
	for n, backup := range []string{"20261126T070000Z", "20261126T070000Z-2", "20261126T070000Z-3"} {
		var out bytes.Buffer
		if err := (&plan{files: []file{f}}).write(&out, root, now); err != nil {
			t.Fatal(err)
		}
		backup = name + ".tidemark-backup-" + backup
		if !strings.Contains(out.String(), "(backup "+backup+")") {
			t.Errorf("said %q, want the backup %s told", out.String(), backup)
		}
		kept, err := os.ReadFile(backup)
		if want := `{"debug": true}` + strings.Repeat(" ", n); err != nil || string(kept) != want {
			t.Errorf("the backup is %q, %v; want %q", kept, err, want)
		}
		for _, p := range []string{name, backup} {
			if info, err := os.Stat(p); err != nil || info.Mode().Perm() != 0o640 {
				t.Errorf("%s has mode %v, %v; want that of the file before", p, info.Mode(), err)
			}
		}
	}
	if files := tree(t, root); len(files) != 4 {
		t.Errorf("there are %d files, want the file and three backups: %v", len(files), files)
	}
}

// One file that is refused is told, with all others that are, and nothing is
// written: not even what could be.
func TestSetupWritesAllOrNothing(t *testing.T) {
	root := t.TempDir()
	put(t, root, "etc/docker/daemon.json", "{\n  \"debug\": true,\n}")
	put(t, root, "etc/docker/certs.d/ghcr.io/hosts.toml", "server = \"https://elsewhere.example\"\n")
	put(t, root, "etc/docker/certs.d/docker.io/ca.crt", "somebody's")
	before := tree(t, root)
	_, code, err := runSetup(t, "docker", "-c", siteConfig(t, ""), "--write", "--root", root)
	if code != exitFailed {
		t.Fatalf("exit %d, %v; want it refused", code, err)
	}
	for _, want := range []string{
		"daemon.json: line 3, column 1: this is no JSON", "ghcr.io/hosts.toml: this is somebody else's", "docker.io/ca.crt would not be read", "nothing was written",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q:\n%v", want, err)
		}
	}
	if after := tree(t, root); len(after) != len(before) {
		t.Errorf("there are %v, want nothing new", after)
	}
}

// Symbolic links are followed and kept, unless they lead out of --root, or nowhere.
func TestSetupFollowsLinksWithinRoot(t *testing.T) {
	root := t.TempDir()
	put(t, root, "srv/docker/daemon.json", "{}")
	link := func(to, at string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, at)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(root, at)); err != nil {
			t.Fatal(err)
		}
	}
	link("../srv/docker", "etc/docker")
	mustSetup(t, "docker", "--upstream", "docker.io", "--write", "--root", root)
	if got := tree(t, root)["/srv/docker/daemon.json"]; !strings.Contains(got, "registry-mirrors") {
		t.Errorf("the file that the link leads to is %q", got)
	}
	if info, err := os.Lstat(filepath.Join(root, "etc/docker")); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v; want it kept", info, err)
	}

	outside := t.TempDir()
	link(outside, "etc/containerd")
	if _, _, err := runSetup(t, "containerd", "--write", "--root", root); err == nil || !strings.Contains(err.Error(), "out of --root") {
		t.Errorf("a link out of --root: %v, want it refused", err)
	}
	link("nothing", "etc/containers")
	if _, _, err := runSetup(t, "podman", "--write", "--root", root); err == nil || !strings.Contains(err.Error(), "symbolic link to nothing") {
		t.Errorf("a link to nothing: %v, want it refused", err)
	}
	if files := tree(t, outside); len(files) > 0 {
		t.Errorf("outside of --root there is %v", files)
	}
}

// Wrong usage is exit code 2, and says what would be right.
func TestSetupTellsWrongUsage(t *testing.T) {
	internal := siteConfig(t, `listen: "0.0.0.0:5050", tls: {mode: internal, hosts: [mirror.example]}`)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"docker", "--registry", "ftp://x"}, "not an address"},
		{[]string{"docker", "--registry", "mirror.example:5050"}, "not an address"},
		{[]string{"docker", "--registry", "https://../etc"}, "not an address"},
		{[]string{"docker", "--registry", "https://a.example/b"}, "more than an address"},
		{[]string{"docker", "--registry", "https://u:p@a.example"}, "more than an address"},
		{[]string{"docker", "-c", internal, "--registry", "http://mirror.example:5050"}, "clients need https"},
		{[]string{"docker", "--ca", "x.crt"}, "--ca is for TLS"},
		{[]string{"docker", "--registry", "https://a.example", "--ca", "/nowhere/x.crt", "--write", "--root", t.TempDir()}, "/nowhere/x.crt"},
		{[]string{"docker", "--upstream", "quay.example"}, "not one of upstreams: docker.io"},
		{[]string{"docker", "--root", "/x"}, "--root is for --write"},
		{[]string{"docker", "--force"}, "--force is for --write"},
		{[]string{"docker", "--intercept"}, "set registry.intercept.listen"},
		{[]string{"docker", "--proxy", "http://a.example:1"}, "--proxy is for --intercept"},
		{[]string{"docker", "--intercept", "--proxy", "mirror.example:5052"}, "http://mirror.example:5052"},
		{[]string{"docker", "--intercept", "--no-fallback", "--proxy", "http://a.example:1"}, "no fallback to close"},
		{[]string{"podman", "-c", internal, "--upstream", "registry.example:5000"}, "a name with a port"},
		{[]string{"buildkit", "--no-fallback"}, "unknown flag"},
		{[]string{"k3s", "extra"}, "usage:"},
	} {
		_, code, err := runSetup(t, c.args...)
		if code != exitUsage || !strings.Contains(err.Error(), c.says) {
			t.Errorf("setup %v = exit %d, %v; want 2 and %q", c.args, code, err, c.says)
		}
	}
}

// On a machine where the server's CA is not, --write says where to get it.
func TestSetupSaysWhereTheCAIs(t *testing.T) {
	config := siteConfig(t, `listen: "0.0.0.0:5050", tls: {mode: internal, hosts: [mirror.example]}, intercept: {listen: "127.0.0.1:5052"}`)
	for _, c := range []struct{ args []string }{{[]string{"docker"}}, {[]string{"docker", "--intercept"}}} {
		name := "internal.crt"
		if len(c.args) > 1 {
			name = "intercept.crt"
		}
		root := t.TempDir()
		_, code, err := runSetup(t, append(c.args, "-c", config, "--write", "--root", root)...)
		if code != exitFailed || !strings.Contains(err.Error(), "http://127.0.0.1:5051/ca/"+name) || !strings.Contains(err.Error(), "--ca") {
			t.Errorf("setup %v = exit %d, %v; want it said where %s is", c.args, code, err, name)
		}
		if files := tree(t, root); len(files) > 0 {
			t.Errorf("setup %v made %v", c.args, files)
		}
		for _, bad := range []string{"", "no certificate", strings.Replace(testCA(t, "test"), "CERTIFICATE", "PRIVATE KEY", 2)} {
			ca := put(t, t.TempDir(), "ca.crt", bad)
			if _, _, err := runSetup(t, append(c.args, "-c", config, "--ca", ca, "--write", "--root", root)...); err == nil || !strings.Contains(err.Error(), "certificate") {
				t.Errorf("setup %v with a CA %.20q = %v, want it refused", c.args, bad, err)
			}
		}
	}
}
