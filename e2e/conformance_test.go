package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	_ "crypto/sha512" // registered for go-digest

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/proxy/upstream/upstreamtest"
)

// conform runs the suite of the distribution specification against a registry, and
// returns what failed and how much passed.
func conform(t *testing.T, registry string, env ...string) (failed []string, passed int, report string) {
	t.Helper()
	cmd := exec.Command(need(t, "oci-conformance"))
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), append(env, "OCI_REGISTRY="+strings.TrimPrefix(registry, "http://"), "OCI_TLS=disabled", "OCI_VERSION=1.1",
		"OCI_RESULTS_DIR="+filepath.Join(cmd.Dir, "results"))...)
	out, err := cmd.CombinedOutput()
	if _, ended := err.(*exec.ExitError); err != nil && !ended {
		t.Fatal(err)
	}
	report = string(out)
	for _, m := range testLine.FindAllStringSubmatch(report, -1) {
		switch m[2] {
		case "FAIL", "Error":
			failed = append(failed, m[1])
		case "Pass":
			passed++
		}
	}
	return failed, passed, report
}

var testLine = regexp.MustCompile(`(?m)^ *(OCI Conformance Test/\S.*): (\w+)$`)

// The specification's own suite finds nothing wrong with pulls and the discovery
// of content, whatever the content is: images and indexes, artifacts and what
// refers to them, foreign layers, blobs of nothing, and digests of sha512.
func TestConformanceOfPullsAndDiscovery(t *testing.T) {
	need(t, "oci-conformance")
	up := upstreamtest.New()
	t.Cleanup(up.Close)
	const repo = "conformance/repo1"
	var tags, manifests, blobs []string
	push := func(tag string, m upstreamtest.Content, content ...upstreamtest.Content) {
		up.PushManifest(repo, m.Digest.String(), m)
		if tag != "" {
			up.PushManifest(repo, tag, m)
			tags = append(tags, tag)
		}
		manifests = append(manifests, m.Digest.String())
		up.PushBlobs(content...)
		for _, c := range content {
			blobs = append(blobs, c.Digest.String())
		}
	}
	img := upstreamtest.NewImage(strings.Repeat("layer", 10_000), "")
	push("image", img.Manifest, append(slices.Clone(img.Layers), img.Config)...)
	idx := upstreamtest.NewIndex("one", "two")
	for _, i := range idx.Images {
		push("", i.Manifest, append(slices.Clone(i.Layers), i.Config)...)
	}
	push("index", idx.Manifest)
	wide := func(mediaType, body string) upstreamtest.Content {
		return upstreamtest.Content{MediaType: mediaType, Digest: digest.SHA512.FromString(body), Body: []byte(body)}
	}
	layer, conf := wide(ocispec.MediaTypeImageLayer, "a layer of sha512"), wide(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	push("sha512", wide(ocispec.MediaTypeImageManifest, manifestOf("", conf, layer, "")), layer, conf)
	foreign := upstreamtest.NewContent(ocispec.MediaTypeImageManifest, []byte(manifestOf("", img.Config, img.Layers[0], `,"urls":["https://elsewhere.example/layer"]`)))
	push("foreign", foreign)
	for _, kind := range []string{"application/vnd.test.sbom", "application/vnd.test.signature"} {
		m := upstreamtest.NewContent(ocispec.MediaTypeImageManifest, []byte(manifestOf(
			fmt.Sprintf(`"artifactType":%q,"subject":{"mediaType":%q,"digest":%q,"size":%d},`, kind, img.Manifest.MediaType, img.Manifest.Digest, len(img.Manifest.Body)), img.Config, img.Layers[0], "")))
		push("", m)
		up.Refer(repo, img.Manifest.Digest, kind, m)
	}

	s := serve(t, config(filepath.Join(t.TempDir(), "data"), up.URL().String()))
	for _, state := range []string{"cold", "cached"} {
		failed, passed, report := conform(t, s.registry, "OCI_REPO1="+repo, "OCI_API_PUSH=false",
			"OCI_API_BLOBS_DELETE=false", "OCI_API_MANIFESTS_DELETE=false", "OCI_API_TAGS_DELETE=false",
			"OCI_RO_DATA_TAGS="+strings.Join(tags, " "), "OCI_RO_DATA_MANIFESTS="+strings.Join(manifests, " "),
			"OCI_RO_DATA_BLOBS="+strings.Join(blobs, " "), "OCI_RO_DATA_REFERRERS="+img.Manifest.Digest.String())
		if len(failed) > 0 || passed < len(tags)+len(manifests)+len(blobs) {
			t.Errorf("%s, %d tests passed and these failed: %q\n%s", state, passed, failed, report)
		}
	}
}

// manifestOf is a manifest of a config and a layer.
func manifestOf(more string, config, layer upstreamtest.Content, ofLayer string) string {
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,%s"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[{"mediaType":%q,"digest":%q,"size":%d%s}]}`,
		ocispec.MediaTypeImageManifest, more, config.MediaType, config.Digest, len(config.Body), layer.MediaType, layer.Digest, len(layer.Body), ofLayer)
}

// Passed through tidemark, pushes and what follows them fail where the registry
// behind it fails, and nowhere else. Deletions are left out: a tag that was served
// goes on being served until its rule lets it go.
func TestConformanceOfPushesIsTheRegistrysOwn(t *testing.T) {
	need(t, "oci-conformance")
	direct, through := startRegistry(t), startRegistry(t)
	s := serve(t, strings.Replace(config(filepath.Join(t.TempDir(), "data"), through.URL), `registry: {`, `registry: {push: pass, `, 1))
	no := []string{"OCI_API_BLOBS_DELETE=false", "OCI_API_MANIFESTS_DELETE=false", "OCI_API_TAGS_DELETE=false"}
	allowed, before, _ := conform(t, direct.addr, no...)
	failed, passed, report := conform(t, s.registry, no...)
	for _, f := range failed {
		if !slices.Contains(allowed, f) {
			t.Errorf("%s fails through tidemark only", f)
		}
	}
	if passed < before {
		t.Errorf("%d tests pass through tidemark, %d directly\n%s", passed, before, report)
	}
}
