package ipvs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"nlb/balancer"
)

// savedFile is in the state folder and says what the settings were.
const savedFile = "ipvs.json"

// content is the file's JSON form. It holds for one boot and one network
// namespace: elsewhere the settings start anew.
type content struct {
	Boot     string   `json:"boot"`
	Netns    string   `json:"netns"`
	Settings []record `json:"settings"`
}

// A damagedError says that the file is there and makes no sense.
type damagedError struct {
	path string
	err  error
}

func (e *damagedError) Error() string { return fmt.Sprintf("%s is damaged: %v", e.path, e.err) }
func (e *damagedError) Unwrap() error { return e.err }

// loadSaved reads the records of a state folder, "" for none. It is a
// *damagedError if the file makes no sense.
func loadSaved(dir string) ([]record, error) {
	if dir == "" {
		return nil, nil
	}
	b, err := os.ReadFile(filepath.Join(dir, savedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("saved settings of IPVS: %w", err)
	}
	c, err := parseSaved(b)
	if err != nil {
		return nil, &damagedError{filepath.Join(dir, savedFile), err}
	}
	boot, netns, err := balancer.Here()
	if err != nil {
		return nil, fmt.Errorf("saved settings of IPVS: %w", err)
	}
	if c.Boot != boot || c.Netns != netns {
		return nil, nil
	}
	return c.Settings, nil
}

// parseSaved reads the file. It lets nothing through but settings of IPVS.
func parseSaved(b []byte) (content, error) {
	var c content
	if err := json.Unmarshal(b, &c); err != nil {
		return content{}, err
	}
	known := append([]string{timeoutTCP, timeoutUDP}, sysctls...)
	for _, r := range c.Settings {
		if !slices.Contains(known, r.Name) {
			return content{}, fmt.Errorf("%q is no setting of IPVS", r.Name)
		}
		if len(r.Ours) == 0 {
			return content{}, fmt.Errorf("%q has no value of ours", r.Name)
		}
	}
	return c, nil
}

// save writes the records. It is on disk when save returns.
func save(dir string, records []record) error {
	if dir == "" {
		return nil
	}
	if err := replaceSaved(dir, records); err != nil {
		return fmt.Errorf("save the settings of IPVS: %w", err)
	}
	return nil
}

func replaceSaved(dir string, records []record) error {
	if len(records) == 0 {
		err := os.Remove(filepath.Join(dir, savedFile))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	boot, netns, err := balancer.Here()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(content{Boot: boot, Netns: netns, Settings: records}, "", "  ")
	if err != nil {
		return err
	}
	return balancer.WriteStateFile(dir, savedFile, append(b, '\n'))
}
