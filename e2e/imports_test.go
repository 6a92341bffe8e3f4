package e2e

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// mayImport is the map of the house: for each package, the packages of ours it
// may import. Adding an arrow here is a design decision; docs/decisions/ says
// why. cmd joins everything, and tests may look from anywhere.
var mayImport = map[string]string{
	"config":                      "",
	"cache":                       "",
	"cache/disk":                  "cache",
	"cache/cachetest":             "cache",
	"audit":                       "audit/taglog",
	"audit/taglog":                "",
	"audit/diff":                  "",
	"audit/publish":               "audit",
	"audit/notify":                "audit",
	"audit/notify/alertmanager":   "audit audit/notify",
	"audit/notify/matrix":         "audit/notify",
	"audit/notify/smtp":           "audit audit/notify",
	"audit/notify/syslog":         "audit audit/notify",
	"audit/notify/discord":        "audit audit/notify",
	"audit/notify/exec":           "audit audit/notify",
	"audit/notify/jsonl":          "audit/notify",
	"audit/notify/ntfy":           "audit audit/notify",
	"audit/notify/shoutrrr":       "audit/notify",
	"audit/notify/slack":          "audit/notify",
	"audit/notify/teams":          "audit audit/notify",
	"audit/notify/webhook":        "audit audit/notify",
	"audit/bundle":                "audit audit/taglog",
	"audit/sqlite":                "audit audit/taglog",
	"audit/audittest":             "audit audit/taglog",
	"proxy":                       "audit audit/diff cache proxy/oci proxy/route proxy/upstream",
	"proxy/oci":                   "",
	"proxy/route":                 "",
	"proxy/upstream":              "proxy/oci",
	"proxy/upstream/upstreamtest": "",
	"proxy/ca":                    "",
	"proxy/front":                 "proxy/ca",
	"proxy/intercept":             "proxy/ca",
	"proxy/admin":                 "audit audit/diff audit/taglog cache",
	"proxy/watch":                 "audit",
	"proxy/carry":                 "audit audit/bundle cache proxy/oci",
}

// The rooms know only what the map lets them know.
func TestImportsFollowTheMap(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "tidemark/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		from := strings.TrimPrefix(pkg.ImportPath, "tidemark/")
		if strings.HasPrefix(from, "cmd/") || from == "e2e" {
			continue
		}
		seen[from] = true
		allowed, ok := mayImport[from]
		if !ok {
			t.Errorf("%s is not on the map", from)
		}
		for _, imp := range pkg.Imports {
			if to, ours := strings.CutPrefix(imp, "tidemark/"); ours && !slices.Contains(strings.Fields(allowed), to) {
				t.Errorf("%s imports %s, which the map does not allow", from, to)
			}
		}
	}
	for from := range mayImport {
		if !seen[from] {
			t.Errorf("%s is on the map and does not exist", from)
		}
	}
}
