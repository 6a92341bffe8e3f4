package oci

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

var platformGrammar = regexp.MustCompile(`^[a-z0-9_]+/[a-z0-9_]+(/[a-z0-9_]+)?$`)

// CheckPlatforms refuses texts that are no platforms: os/arch or os/arch/variant.
func CheckPlatforms(platforms []string) error {
	for _, p := range platforms {
		if !platformGrammar.MatchString(p) {
			return fmt.Errorf("%.100q is no platform such as linux/amd64 or linux/arm/v7", p)
		}
	}
	return nil
}

// Wanted tells whether an image of a platform is among those that are wanted; nil
// wants all. linux/arm64 stands for linux/arm64/v8, too.
func Wanted(platforms []string, platform string) bool {
	return platforms == nil || slices.ContainsFunc(platforms, func(p string) bool { return p == platform || strings.HasPrefix(platform, p+"/") })
}

// PlatformOf reads the platform of an image from its configuration, "" if that does
// not tell.
func PlatformOf(config []byte) string {
	var c struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
	}
	if json.Unmarshal(config, &c) != nil || c.OS == "" || c.Architecture == "" {
		return ""
	}
	return strings.TrimSuffix(c.OS+"/"+c.Architecture+"/"+c.Variant, "/")
}
