package oci_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/proxy/oci"
)

const (
	sha256 = digest.Digest("sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
	sha512 = digest.Digest("sha512:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
)

// A request of a pull is read as what it asks for, also when the name contains
// the words of a route.
func TestRequestsOfAPull(t *testing.T) {
	longest := strings.Repeat("a", 255)
	for _, tt := range []struct {
		path string
		want oci.Request
	}{
		{"/v2", oci.Request{Kind: oci.Ping}},
		{"/v2/", oci.Request{Kind: oci.Ping}},

		{"/v2/nginx/manifests/latest", oci.Request{Kind: oci.Manifest, Name: "nginx", Tag: "latest"}},
		{"/v2/library/nginx/manifests/1.27", oci.Request{Kind: oci.Manifest, Name: "library/nginx", Tag: "1.27"}},
		{"/v2/ghcr.io/a_b/c-d/e__f/g--h/0/manifests/_V.1-x", oci.Request{Kind: oci.Manifest, Name: "ghcr.io/a_b/c-d/e__f/g--h/0", Tag: "_V.1-x"}},
		{"/v2/nginx/manifests/" + longest[:128], oci.Request{Kind: oci.Manifest, Name: "nginx", Tag: longest[:128]}},
		{"/v2/nginx/manifests/" + sha256.String(), oci.Request{Kind: oci.Manifest, Name: "nginx", Digest: sha256}},
		{"/v2/nginx/manifests/" + sha512.String(), oci.Request{Kind: oci.Manifest, Name: "nginx", Digest: sha512}},
		{"/v2/nginx/blobs/" + sha256.String(), oci.Request{Kind: oci.Blob, Name: "nginx", Digest: sha256}},
		{"/v2/a/b/c/blobs/" + sha512.String(), oci.Request{Kind: oci.Blob, Name: "a/b/c", Digest: sha512}},
		{"/v2/library/nginx/tags/list", oci.Request{Kind: oci.TagList, Name: "library/nginx"}},
		{"/v2/" + longest + "/tags/list", oci.Request{Kind: oci.TagList, Name: longest}},

		{"/v2/a/b/referrers/" + sha256.String(), oci.Request{Kind: oci.Referrers, Name: "a/b", Digest: sha256}},
		{"/v2/a/referrers/referrers/" + sha512.String(), oci.Request{Kind: oci.Referrers, Name: "a/referrers", Digest: sha512}},
		{"/v2/a/referrers/manifests/latest", oci.Request{Kind: oci.Manifest, Name: "a/referrers", Tag: "latest"}},
		{"/v2/_catalog", oci.Request{Kind: oci.Catalog}},

		{"/v2/library/nginx/_tidemark/tag-history/1.27", oci.Request{Kind: oci.TagHistory, Name: "library/nginx", Tag: "1.27"}},
		{"/v2/library/nginx/_oci/tag-history/1.27", oci.Request{Kind: oci.OCITagHistory, Name: "library/nginx", Tag: "1.27"}},

		{"/v2/manifests/manifests/manifests", oci.Request{Kind: oci.Manifest, Name: "manifests", Tag: "manifests"}},
		{"/v2/a/manifests/blobs/" + sha256.String(), oci.Request{Kind: oci.Blob, Name: "a/manifests", Digest: sha256}},
		{"/v2/a/blobs/manifests/latest", oci.Request{Kind: oci.Manifest, Name: "a/blobs", Tag: "latest"}},
		{"/v2/a/uploads/manifests/uploads", oci.Request{Kind: oci.Manifest, Name: "a/uploads", Tag: "uploads"}},
		{"/v2/a/tags/list/manifests/list", oci.Request{Kind: oci.Manifest, Name: "a/tags/list", Tag: "list"}},
		{"/v2/tags/list/tags/list", oci.Request{Kind: oci.TagList, Name: "tags/list"}},
		{"/v2/v2/manifests/v2", oci.Request{Kind: oci.Manifest, Name: "v2", Tag: "v2"}},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			if got, err := oci.Parse(method, tt.path); err != nil || got != tt.want {
				t.Errorf("%s %s = %+v, %v; want %+v", method, tt.path, got, err, tt.want)
			}
		}
	}
}

// Whatever would change a repository is a push, and so is all that belongs to
// the upload of a blob. Its name is held to the grammar nevertheless.
func TestRequestsThatChangeARepositoryArePushes(t *testing.T) {
	for _, tt := range []struct {
		method, path string
		tag          string
		digest       digest.Digest
	}{
		{"PUT", "/v2/a/b/manifests/latest", "latest", ""},
		{"DELETE", "/v2/a/b/manifests/" + sha256.String(), "", sha256},
		{"DELETE", "/v2/a/b/blobs/" + sha256.String(), "", sha256},
		{"POST", "/v2/a/b/tags/list", "", ""},
		{"POST", "/v2/a/b/blobs/uploads", "", ""},
		{"POST", "/v2/a/b/blobs/uploads/", "", ""},
		{"PATCH", "/v2/a/b/blobs/uploads/0c2a", "", ""},
		{"PUT", "/v2/a/b/blobs/uploads/0c2a/more?=.", "", ""},
		{"GET", "/v2/a/b/blobs/uploads/0c2a", "", ""},
		{"HEAD", "/v2/a/b/blobs/uploads/", "", ""},
	} {
		want := oci.Request{Kind: oci.Push, Name: "a/b", Tag: tt.tag, Digest: tt.digest}
		if got, err := oci.Parse(tt.method, tt.path); err != nil || got != want {
			t.Errorf("%s %s = %+v, %v; want %+v", tt.method, tt.path, got, err, want)
		}
	}
	for _, path := range []string{"/v2/../a/manifests/latest", "/v2/A/blobs/uploads/", "/v2//blobs/uploads/0c2a"} {
		if _, err := oci.Parse("POST", path); !refuses(err, 400, oci.NameInvalid) {
			t.Errorf("POST %s: %v; want 400 NAME_INVALID", path, err)
		}
	}
}

// What does not follow the grammar is refused with the specification's code,
// and never becomes a name, a tag or a digest.
func TestMalformedRequests(t *testing.T) {
	hex := sha256.Encoded()
	for _, tt := range []struct {
		status int
		code   string
		paths  []string
	}{
		{400, oci.NameInvalid, []string{
			"/v2//manifests/latest",
			"/v2/a//b/manifests/latest",
			"/v2//a/manifests/latest",
			"/v2/a//manifests/latest",
			"/v2/Nginx/manifests/latest",
			"/v2/a/B/tags/list",
			"/v2/../manifests/latest",
			"/v2/a/../../etc/manifests/passwd",
			"/v2/./a/tags/list",
			"/v2/a/..b/tags/list",
			"/v2/a..b/tags/list",
			"/v2/a%2Fb/manifests/latest",
			"/v2/a\\b/manifests/latest",
			"/v2/-a/manifests/latest",
			"/v2/a-/manifests/latest",
			"/v2/a___b/manifests/latest",
			"/v2/a._b/manifests/latest",
			"/v2/a b/manifests/latest",
			"/v2/a\n/manifests/latest",
			"/v2/a\x00/manifests/latest",
			"/v2/ä/manifests/latest",
			"/v2/\xff/manifests/latest",
			"/v2/localhost:5000/a/manifests/latest",
			"/v2/a@" + sha256.String() + "/manifests/latest",
			"/v2/" + strings.Repeat("a", 256) + "/manifests/latest",
			"/v2/" + strings.Repeat("a/", 128) + "a/tags/list",
			"/v2/../blobs/" + sha256.String(),
		}},
		{400, oci.TagInvalid, []string{
			"/v2/a/manifests/",
			"/v2/a/manifests/.",
			"/v2/a/manifests/..",
			"/v2/a/manifests/.hidden",
			"/v2/a/manifests/-x",
			"/v2/a/manifests/a b",
			"/v2/a/manifests/a\n",
			"/v2/a/manifests/a%2F..",
			"/v2/a/manifests/a+b",
			"/v2/a/manifests/ä",
			"/v2/a/manifests/" + strings.Repeat("a", 129),
			"/v2/a/manifests/" + hex + "@sha256",
		}},
		{400, oci.DigestInvalid, []string{
			"/v2/a/manifests/sha256:",
			"/v2/a/manifests/:",
			"/v2/a/manifests/:" + hex,
			"/v2/a/manifests/latest:" + hex,
			"/v2/a/manifests/sha256:" + hex[1:],
			"/v2/a/manifests/sha256:" + hex + "0",
			"/v2/a/manifests/sha256:" + strings.ToUpper(hex),
			"/v2/a/manifests/SHA256:" + hex,
			"/v2/a/manifests/sha256:" + hex[:63] + "g",
			"/v2/a/manifests/sha256:" + hex + "\n",
			"/v2/a/manifests/ sha256:" + hex,
			"/v2/a/manifests/sha512:" + hex,
			"/v2/a/manifests/sha256:" + sha512.Encoded(),
			"/v2/a/manifests/sha384:" + sha512.Encoded()[:96],
			"/v2/a/manifests/md5:" + hex[:32],
			"/v2/a/manifests/blake3:" + hex,
			"/v2/a/manifests/sha256+b64u:LCa0a2j_xo_5m0U8HTBBNBNCLXBkg7-g-YpeiGJm564",
			"/v2/a/blobs/",
			"/v2/a/blobs/latest",
			"/v2/a/blobs/..",
			"/v2/a/blobs/" + hex,
			"/v2/a/blobs/sha256:.." + hex[2:],
		}},
		{404, oci.Unsupported, []string{
			"", "/", "/v1/", "/v2x", "/v2x/", "v2/", "//v2/", "/v2/a", "/v2/_catalog/", "/v2/a/_catalog", "/v2/referrers/" + sha256.String(), "/v2/manifests/latest",
			"/v2/a/tags", "/v2/a/tags/", "/v2/a/tags/list/", "/v2/a/tags/latest",
			"/v2/a/manifests/b/c", "/v2/a/manifests/../../../etc/passwd", "/v2/../../etc/passwd",
			"/v2/a/blobs/" + sha256.String() + "/", "/v2/a/Manifests/latest",
			"/v2/a/tag-history/latest", "/v2/a/_other/tag-history/latest", "/v2/_tidemark/tag-history/latest",
		}},
	} {
		for _, path := range tt.paths {
			got, err := oci.Parse("GET", path)
			if !refuses(err, tt.status, tt.code) {
				t.Errorf("GET %q = %+v, %v; want %d %s", path, got, err, tt.status, tt.code)
			}
		}
	}
	if _, err := oci.Parse("POST", "/v2/"); !refuses(err, 405, oci.Unsupported) {
		t.Errorf("POST /v2/: %v; want 405 UNSUPPORTED", err)
	}
}

// refuses tells whether err is an answer for the client with status and code.
func refuses(err error, status int, code string) bool {
	var e *oci.Error
	return errors.As(err, &e) && e.Status == status && e.Code == code && e.Message != ""
}

// However long a request is, the answer that refuses it is not.
func TestRefusalsAreShort(t *testing.T) {
	long := strings.Repeat("é", 100_000)
	for _, path := range []string{long, "/v2/" + long, "/v2/" + long + "/manifests/latest", "/v2/a/manifests/" + long, "/v2/a/blobs/" + long, "/v2/a/blobs/sha256:" + long} {
		_, err := oci.Parse("GET", path)
		var e *oci.Error
		if !errors.As(err, &e) || len(e.Message) > 4000 {
			t.Errorf("GET %.40s… is refused in %d bytes: %.100v…", path, len(err.Error()), err)
		}
	}
}

// A refusal is the specification's JSON, whatever the client sent.
func TestErrorIsWrittenAsTheSpecificationSays(t *testing.T) {
	for _, tt := range []struct {
		err  oci.Error
		want string
	}{
		{oci.Error{Status: 404, Code: oci.ManifestUnknown, Message: "no such tag"},
			`{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such tag"}]}`},
		{oci.Error{Status: 429, Code: oci.TooManyRequests, Message: `say "please"`, Detail: map[string]any{"upstream": "docker.io", "status": 429}},
			`{"errors":[{"code":"TOOMANYREQUESTS","message":"say \"please\"","detail":{"status":429,"upstream":"docker.io"}}]}`},
	} {
		rec := httptest.NewRecorder()
		rec.Header().Set("Retry-After", "60")
		tt.err.Write(rec)
		if rec.Code != tt.err.Status || rec.Body.String() != tt.want {
			t.Errorf("%v is written as %d %s, want %d %s", &tt.err, rec.Code, rec.Body, tt.err.Status, tt.want)
		}
		for key, want := range map[string]string{"Content-Type": "application/json", "Content-Length": strconv.Itoa(len(tt.want)), "Retry-After": "60"} {
			if got := rec.Header().Get(key); got != want {
				t.Errorf("%v is written with %s: %s, want %s", &tt.err, key, got, want)
			}
		}
	}

	_, err := oci.Parse(http.MethodGet, "/v2/a/manifests/<script>\xff\"\n")
	var e *oci.Error
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	e.Write(rec)
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &body); err != nil || len(body.Errors) != 1 || body.Errors[0].Code != oci.TagInvalid || strings.Contains(rec.Body.String(), "<script>") {
		t.Errorf("the refusal is %s, %v; want one TAG_INVALID without markup", rec.Body, err)
	}
}

// Logs and metrics have a word for every kind of request.
func TestKindsHaveNames(t *testing.T) {
	for kind, want := range map[oci.Kind]string{oci.Ping: "ping", oci.Manifest: "manifest", oci.Blob: "blob", oci.TagList: "tags", oci.TagHistory: "tag-history", oci.OCITagHistory: "tag-history", oci.Push: "push"} {
		if got := kind.String(); got != want {
			t.Errorf("kind %d is called %s, want %s", int(kind), got, want)
		}
	}
}

// specName is the grammar of names as distribution-spec prints it.
var specName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)

// No path is read as something that the grammar does not allow.
func FuzzParse(f *testing.F) {
	for _, path := range []string{
		"/v2/", "/v2/a/manifests/latest", "/v2/a/b.c/manifests/" + sha256.String(), "/v2/a/blobs/" + sha512.String(), "/v2/a__b/tags/list",
		"/v2/a/blobs/uploads/0c2a", "/v2/a/../b/manifests/..", "/v2/a//b/manifests/x", "/v2/a%2Fb/blobs/sha256:00", "/v2/a/blobs/uploads/blobs/uploads/x",
	} {
		f.Add("GET", path)
		f.Add("PUT", path)
	}
	f.Fuzz(func(t *testing.T, method, path string) {
		req, err := oci.Parse(method, path)
		if err != nil {
			var e *oci.Error
			if !errors.As(err, &e) || e.Status < 400 || e.Status > 499 {
				t.Fatalf("%s %q: %v; want a refusal that blames the client", method, path, err)
			}
			e.Write(httptest.NewRecorder())
			return
		}
		hasName, hasTag, hasDigest := req.Name != "", req.Tag != "", req.Digest != ""
		history := req.Kind == oci.TagHistory || req.Kind == oci.OCITagHistory
		wantRef := req.Kind == oci.Manifest || req.Kind == oci.Blob || req.Kind == oci.Referrers || history
		switch {
		case hasName == (req.Kind == oci.Ping || req.Kind == oci.Catalog), hasTag && hasDigest, (hasTag || hasDigest) != wantRef && req.Kind != oci.Push, hasTag && req.Kind == oci.Referrers, hasTag && req.Kind == oci.Blob, hasDigest && history,
			hasName && (!specName.MatchString(req.Name) || len(req.Name) > 255 || strings.Contains(req.Name, "..")),
			strings.ContainsAny(req.Tag, "/:") || strings.HasPrefix(req.Tag, "."),
			hasDigest && req.Digest.Validate() != nil,
			req.Kind != oci.Push && method != "GET" && method != "HEAD":
			t.Fatalf("%s %q = %+v", method, path, req)
		}
	})
}
