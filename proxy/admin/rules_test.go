package admin_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The alert rules that are shipped are about series that there are. That they fire when
// they should is promtool's to test.
func TestRulesAreAboutOurSeries(t *testing.T) {
	rules, err := os.ReadFile("../../deploy/prometheus/tidemark.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	operating, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	series := regexp.MustCompile(`tidemark_[a-z_]+`).FindAllString(string(rules), -1)
	slices.Sort(series)
	for _, name := range slices.Compact(series) {
		if !strings.Contains(string(source), `"`+name+`"`) && !strings.Contains(string(source), `desc("`+strings.TrimPrefix(name, "tidemark_")+`"`) {
			t.Errorf("a rule is about %s, which is none of our series", name)
		}
	}
	if len(series) < 8 || !strings.Contains(string(operating), "tidemark.rules.yml") {
		t.Errorf("%d series; docs/operating.md says what to do about the rules", len(series))
	}
}
