package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
)

// Where BuildKit's configuration is.
const (
	buildkitConfig = "/etc/buildkit/buildkitd.toml"
	buildkitCA     = "/etc/buildkit/tidemark-ca.crt"
)

// Lines around what is tidemark's in a file of somebody else.
const (
	blockBegin = "# tidemark: begin"
	blockEnd   = "# tidemark: end"
)

func newSetupBuildKit() *cobra.Command {
	f := &setupFlags{}
	return addSetup(&cobra.Command{
		Use:   "buildkit",
		Short: "Point BuildKit at this server, for every upstream",
		Long: `Print or write a block for buildkitd.toml, which has BuildKit ask this server first,
and the registry itself when this server does not answer or does not have it.
BuildKit knows no way to close that fallback.`,
		Example: `  tidemark setup buildkit
  tidemark setup buildkit -c tidemark.yaml --write`,
	}, f, planBuildKit)
}

func planBuildKit(s *site, _ *setupFlags) (*plan, error) {
	p := &plan{steps: []string{"systemctl restart buildkit"}}
	if s.ca != nil {
		p.files = append(p.files, file{
			path: buildkitCA, mode: 0o644, edit: replaceCA(s.ca),
			intro: fmt.Sprintf("Copy the CA of this server to %s. It is %s.", buildkitCA, s.ca.source()),
		})
	}
	block := s.buildkitBlock()
	p.files = append(p.files, file{
		path: buildkitConfig, mode: 0o644, text: block,
		intro: fmt.Sprintf("Put this at the end of %s:", buildkitConfig),
		edit: func(old []byte) ([]byte, error) {
			return editBuildKit(old, block, append(slices.Clone(s.upstreams), s.registry.Host))
		},
	})
	p.notes = []string{
		"A builder of docker buildx has a configuration of its own, which it copies when it is made:\n\n" +
			"  docker buildx create --use --driver docker-container --config " + buildkitConfig,
		"The builder in Docker itself (the default one) follows Docker's own configuration: tidemark setup docker.",
		"When this server does not answer, or answers with an error, BuildKit goes to the registry itself.",
	}
	if s.isLoopback() {
		p.notes = append(p.notes, fmt.Sprintf("A builder in a container does not reach %s of this machine, unless it is made with --driver-opt network=host.", s.registry.Host))
	}
	p.notes = append(p.notes, s.notes("BuildKit takes them from whoever builds: docker login "+s.registry.Host+".")...)
	return p, nil
}

// buildkitBlock is what belongs into buildkitd.toml. BuildKit tells a mirror which
// registry it asks for (?ns=), so the mirror's address is the same for all.
func (s *site) buildkitBlock() string {
	var b strings.Builder
	b.WriteString(blockBegin + "\n")
	for _, name := range s.upstreams {
		fmt.Fprintf(&b, "[registry.%q]\n  mirrors = [%q]\n\n", name, s.registry.Host)
	}
	fmt.Fprintf(&b, "[registry.%q]\n  http = %t\n", s.registry.Host, s.registry.Scheme == "http")
	if s.ca != nil {
		fmt.Fprintf(&b, "  ca = [%q]\n", buildkitCA)
	}
	b.WriteString(blockEnd + "\n")
	return b.String()
}

// editBuildKit returns buildkitd.toml with the block in the place of the one
// before, or at the end. What it says of the block's registries elsewhere would
// make the file unreadable.
func editBuildKit(old []byte, block string, registries []string) ([]byte, error) {
	before, after, err := cutBlock(old)
	if err != nil {
		return nil, err
	}
	others := slices.Concat(before, after)
	var config struct {
		Registry any `toml:"registry"`
	}
	if err := parseTOML(others, &config); err != nil {
		return nil, err
	}
	if tables, ok := config.Registry.(map[string]any); ok {
		for _, name := range registries {
			if _, ok := tables[name]; ok {
				return nil, fmt.Errorf("there is a [registry.%q] already, outside of the lines %q and %q: take it out, or leave this upstream out (--upstream)", name, blockBegin, blockEnd)
			}
		}
	}
	if len(before) == len(old) && len(before) > 0 { // there was none
		before = append(bytes.TrimSuffix(before, []byte("\n")), "\n\n"...)
	}
	updated := slices.Concat(before, []byte(block), after)
	if err := parseTOML(updated, &config); err != nil {
		return nil, fmt.Errorf("the block cannot be added, because of how the rest is written: put it there by hand (%w)", err)
	}
	return updated, nil
}

// parseTOML reads a file of TOML into v.
func parseTOML(text []byte, v any) error {
	err := toml.Unmarshal(text, v)
	var de *toml.DecodeError
	if errors.As(err, &de) {
		line, column := de.Position()
		return fmt.Errorf("line %d, column %d: this is no TOML that is understood: %w", line, column, err)
	}
	return err
}

// cutBlock returns what is before and after the lines of tidemark's block. All is
// before when there is none.
func cutBlock(text []byte) (before, after []byte, err error) {
	begin, end := -1, -1
	at := 0
	for line := range bytes.Lines(text) {
		switch string(bytes.TrimSpace(line)) {
		case blockBegin:
			if begin >= 0 {
				return nil, nil, fmt.Errorf("the line %q is there twice", blockBegin)
			}
			begin = at
		case blockEnd:
			if begin < 0 || end >= 0 {
				return nil, nil, fmt.Errorf("the line %q ends nothing", blockEnd)
			}
			end = at + len(line)
		}
		at += len(line)
	}
	switch {
	case begin < 0:
		return text, nil, nil
	case end < 0:
		return nil, nil, errors.New("the line " + blockBegin + " has no " + blockEnd)
	}
	return text[:begin], text[end:], nil
}
